"""The two dialects of `ModelStreamInfer`: Triton wraps each reply in an envelope, MLServer sends plain replies."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TypeAlias

from google.protobuf.message import DecodeError

from guard.protocol.inference_pb2 import ModelInferResponse, ModelStreamInferResponse

FINAL = "triton_final_response"
"""Parameter by which Triton marks the last of several replies to one request."""
ASK_FOR_FINAL = "triton_enable_empty_final_response"
"""Parameter of a request with which a client asks Triton for that mark."""
ERRORS_AS_STATUS = "triton_grpc_error"
"""Metadata key with which, by the value `true`, a client asks Triton for errors as the status of the stream."""
Envelope: TypeAlias = ModelStreamInferResponse | ModelInferResponse


class Dialect(StrEnum):
    """Dialect of the replies of a stream."""

    TRITON = "triton"
    """`ModelStreamInferResponse`, with room for an error in place of a reply."""
    MLSERVER = "mlserver"
    """`ModelInferResponse`; an error ends the stream. All replies have the id of the first request."""


class StreamDialect:
    """The dialect that the upstream server uses.

    If the setting is `auto`, the first reply that can be of one dialect only decides; every reply with an output is
    such a reply. Until then, the name in the server's metadata decides.

    Args:
        setting: `auto`, or a dialect.
        server_name: Asks the upstream server for the name in its metadata.
    """

    def __init__(self, setting: str, server_name: Callable[[], Awaitable[str]]) -> None:
        self._known = None if setting == "auto" else Dialect(setting)
        self._server_name = server_name

    def of(self, reply: bytes) -> Dialect | None:
        """The dialect of a reply; None if it is not known yet, in which case the reply has no outputs."""
        if self._known is None:
            self._known = seen_in(reply)
        return self._known

    async def ask(self) -> Dialect | None:
        """The dialect before any reply; None if the server's name is neither that of Triton nor that of MLServer."""
        if self._known is None:
            name = (await self._server_name()).lower()
            return next((dialect for dialect in Dialect if dialect in name), None)
        return self._known


def seen_in(reply: bytes) -> Dialect | None:
    """The dialect of a reply; None if it could be of both, or is of neither.

    The envelope has the fields 1 (a string) and 2 (a reply). In a plain reply these are the name and the version of the
    model, and its id, parameters and outputs have higher numbers.
    """
    try:
        plain = ModelInferResponse.FromString(reply)
        if plain.id or plain.parameters or plain.outputs or plain.raw_output_contents:
            return Dialect.MLSERVER
    except DecodeError:
        # The second field of an envelope need not be a valid string.
        pass
    try:
        inner = ModelStreamInferResponse.FromString(reply).infer_response
    except DecodeError:
        return None
    return Dialect.TRITON if inner.model_name or inner.outputs else None


def opened(reply: bytes, dialect: Dialect | None) -> tuple[Envelope, ModelInferResponse]:
    """Parse a message of a stream.

    Returns:
        The message, and the reply in it; changes of the reply are changes of the message.

    Raises:
        DecodeError: The bytes are not a message of this dialect.
    """
    if dialect is Dialect.MLSERVER:
        plain = ModelInferResponse.FromString(reply)
        return plain, plain
    envelope = ModelStreamInferResponse.FromString(reply)
    return envelope, envelope.infer_response


def error_reply(message: str, *, model: str, request_id: str, like: ModelInferResponse | None = None) -> bytes:
    """A serialised error in Triton's dialect.

    Args:
        message: The error message that is sent to the client.
        model: Name of the model.
        request_id: Id of the request that the error answers.
        like: The reply that the error replaces, if there is one; a mark of the last reply is copied from it.
    """
    envelope = ModelStreamInferResponse(error_message=message)
    envelope.infer_response.model_name, envelope.infer_response.id = model, request_id
    if like is not None and FINAL in like.parameters:
        envelope.infer_response.parameters[FINAL].CopyFrom(like.parameters[FINAL])
    return envelope.SerializeToString()
