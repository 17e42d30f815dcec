"""How a test server answers like Triton, MLServer or KServe (by each server's own .proto, as of 2026-11)."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

from guard.protocol import MODEL_CONTROL
from guard.protocol.inference_pb2 import ModelReadyRequest

Dialect: TypeAlias = Literal["triton", "mlserver", "kserve"]

_REPOSITORY = ("RepositoryIndex", *MODEL_CONTROL)
_OF_MLSERVER = "/inference.model_repository.ModelRepositoryService/"
REPOSITORY_METHODS = {
    "triton": frozenset(_REPOSITORY),
    "mlserver": frozenset((*_REPOSITORY, *(_OF_MLSERVER + method for method in _REPOSITORY))),
    "kserve": frozenset(MODEL_CONTROL),
}
"""The methods that list, load and unload models, by dialect."""


def field(number: int, data: bytes) -> bytes:
    """A serialised protobuf field of bytes, of a string or of a message.

    Written by hand, because what a test puts into an envelope need not be a message.
    """
    length, size = len(data), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + data


def stream_reply(reply: bytes) -> bytes:
    """A reply in Triton's ModelStreamInferResponse; MLServer's streams carry the reply itself."""
    return field(2, reply)


def repository_reply(dialect: Dialect, method: str, data: bytes, names: Iterable[str]) -> bytes:
    """The serialised answer to one of the methods that list, load and unload models.

    Args:
        dialect: The dialect of the server.
        method: One of `REPOSITORY_METHODS`.
        data: The serialised request.
        names: Names of the models that the server has.
    """
    if method.endswith("RepositoryIndex"):
        return b"".join(field(1, field(1, name.encode()) + field(3, b"READY")) for name in names)
    if dialect == "kserve":
        # The request has the model's name where ModelReadyRequest has it. The reply: model_name, and true.
        return field(1, ModelReadyRequest.FromString(data).name.encode()) + b"\x10\x01"
    return b""
