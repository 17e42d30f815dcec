"""What arrived at the server, and what a test lets go wrong there."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from numpy.typing import NDArray

from guard.protocol.arrays import read_inputs
from guard.protocol.tensors import parse_request

Pairs: TypeAlias = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Call:
    """A call that arrived, or one message of a stream.

    Attributes:
        method: `ModelInfer` and the like; of other services the whole path, `/package.Service/Method`.
        data: The message, as it came.
        metadata: Sent with the call; repeated keys are repeated, and values of keys that end in `-bin` are bytes.
        remaining: Seconds until its deadline; None if it has none.
    """

    method: str
    data: bytes
    metadata: Pairs
    remaining: float | None

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """The tensors of an inference request by name; BYTES are arrays of bytes objects.

        Raises:
            RequestError: It is no inference request, or a malformed one.
        """
        return read_inputs(parse_request(self.data))

    @property
    def outputs(self) -> list[str]:
        """The outputs that an inference request lists; an empty list asks for all.

        Raises:
            RequestError: It is no inference request.
        """
        return [output.name for output in parse_request(self.data).outputs]


@dataclass(frozen=True)
class Fault:
    """An error instead of an answer.

    Attributes:
        code: gRPC status.
        details: Its message.
        trailing: Metadata that goes with it.
    """

    code: grpc.StatusCode
    details: str = ""
    trailing: Pairs = ()


class FailedError(Exception):
    """Carries a fault to where calls are answered."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.fault = Fault(code, details)
