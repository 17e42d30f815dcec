"""Calls that a test server received, and faults that a test makes it answer with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from guard.protocol.messages import parse_request

if TYPE_CHECKING:
    from numpy.typing import NDArray

Pairs: TypeAlias = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Call:
    """A call that the server received, or one message of a stream.

    Attributes:
        method: The name, such as `ModelInfer`; for other services the whole path, `/package.Service/Method`.
        data: The message, as it arrived.
        metadata: The metadata of the call; repeated keys are repeated, and values of keys that end in `-bin` are bytes.
        remaining: Seconds until the deadline; None if the call has none.
    """

    method: str
    data: bytes
    metadata: Pairs
    remaining: float | None

    @property
    def inputs(self) -> "dict[str, NDArray[Any]]":
        """The tensors of an inference request by name; BYTES are arrays of bytes objects.

        Raises:
            RequestError: The message is not an inference request, or a malformed one.
        """
        from guard.protocol.tensors import read_inputs

        return read_inputs(parse_request(self.data))

    @property
    def outputs(self) -> list[str]:
        """The outputs that an inference request lists; an empty list asks for all.

        Raises:
            RequestError: The message is not an inference request.
        """
        return [output.name for output in parse_request(self.data).outputs]


@dataclass(frozen=True)
class Fault:
    """An error that is sent instead of an answer.

    Attributes:
        code: The gRPC status code.
        details: The message of the status.
        trailing: Trailing metadata that are sent with the status.
    """

    code: grpc.StatusCode
    details: str = ""
    trailing: Pairs = ()


class FailedError(Exception):
    """Carries a fault to the place where calls are answered."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.fault = Fault(code, details)
