"""What all handlers of gRPC calls have in common: the types of a call, and the error that ends it with a status."""

from typing import TypeAlias

import grpc

from guard.protocol import SERVICE
from guard.sidecar.policy import Reason

INFER, STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
"""Paths of the two methods whose requests are screened."""
Context: TypeAlias = grpc.aio.ServicerContext
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


class RefusedError(Exception):
    """A call is answered with a gRPC status instead of a reply.

    Args:
        code: The gRPC status code.
        message: The message that is sent to the client.
        trailing: Trailing metadata that is sent with the status.
        reason: Why the request could not be checked, if it is refused for that reason.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, *, trailing: Metadata = (), reason: Reason | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.trailing, self.reason = code, message, trailing, reason
