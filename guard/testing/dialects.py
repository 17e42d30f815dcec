"""Where Triton, MLServer and KServe differ on the wire (each server's own .proto, as of 2026-11)."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

from guard.protocol.inference_pb2 import ModelInferResponse, ModelReadyRequest

Dialect: TypeAlias = Literal["triton", "mlserver", "kserve"]

SERVICE = "/inference.GRPCInferenceService/"
_MLSERVERS_OWN = "/inference.model_repository.ModelRepositoryService/"
_REPOSITORY = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
REPOSITORY = {
    "triton": frozenset(_REPOSITORY),
    "mlserver": frozenset((*_REPOSITORY, *(_MLSERVERS_OWN + method for method in _REPOSITORY))),
    "kserve": frozenset(_REPOSITORY[1:]),
}
"""The methods that manage models, by dialect."""


def field(number: int, data: bytes) -> bytes:
    """One protobuf field of bytes, a string or a message.

    Written by hand, because what a test puts into an envelope need not be a message.
    """
    length, size = len(data), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + data


def stream_reply(reply: bytes) -> bytes:
    """Triton's ModelStreamInferResponse with an answer; MLServer's streams carry the answer itself."""
    return field(2, reply)


def stream_error(details: str, request_id: str) -> bytes:
    """Triton's ModelStreamInferResponse with an error, and the id of the request that it is about."""
    return field(1, details.encode()) + stream_reply(ModelInferResponse(id=request_id).SerializeToString())


def repository_reply(dialect: Dialect, method: str, data: bytes, names: Iterable[str]) -> bytes:
    """The answer to one of the methods that manage models.

    Args:
        dialect: Spoken.
        method: One of `REPOSITORY`.
        data: The request.
        names: The models that there are.
    """
    if method.endswith("RepositoryIndex"):
        return b"".join(field(1, field(1, name.encode()) + field(3, b"READY")) for name in names)
    if dialect == "kserve":
        # The request has the model's name where ModelReadyRequest has it. The reply: model_name, and true.
        return field(1, ModelReadyRequest.FromString(data).name.encode()) + b"\x10\x01"
    return b""
