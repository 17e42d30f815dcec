"""What the replies of `ModelStreamInfer` look like: Triton's lie in an envelope, MLServer's are plain."""

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
    """Of a stream."""

    TRITON = "triton"
    """`ModelStreamInferResponse`, with room for an error in place of a reply."""
    MLSERVER = "mlserver"
    """`ModelInferResponse`; an error ends the stream. All replies have the id of the first request."""


class StreamDialect:
    """Which dialect the upstream server speaks.

    If the settings leave it open, the first reply says so that cannot be of the other dialect; every reply with an
    output is one. Before there is one, the name decides that the server has in its metadata.

    Args:
        setting: `auto`, or the dialect.
        server_name: Asks the upstream server what it calls itself.
    """

    def __init__(self, setting: str, server_name: Callable[[], Awaitable[str]]) -> None:
        self._known = None if setting == "auto" else Dialect(setting)
        self._server_name = server_name

    def of(self, reply: bytes) -> Dialect | None:
        """The dialect of a reply; None if that is not known, in which case it holds no outputs."""
        if self._known is None:
            self._known = seen_in(reply)
        return self._known

    async def ask(self) -> Dialect | None:
        """The dialect, before there was a reply; None if the server's name is neither Triton's nor MLServer's."""
        if self._known is None:
            name = (await self._server_name()).lower()
            return next((dialect for dialect in Dialect if dialect in name), None)
        return self._known


def seen_in(reply: bytes) -> Dialect | None:
    """The dialect of a reply; None if it could be of both, or is of neither.

    The envelope has the fields 1 (text) and 2 (a reply), which in a plain reply are the names of model and version;
    what makes a reply, ids, parameters and outputs, are later fields there.
    """
    try:
        plain = ModelInferResponse.FromString(reply)
        if plain.id or plain.parameters or plain.outputs or plain.raw_output_contents:
            return Dialect.MLSERVER
    except DecodeError:
        # The envelope's second field need not be text.
        pass
    try:
        inner = ModelStreamInferResponse.FromString(reply).infer_response
    except DecodeError:
        return None
    return Dialect.TRITON if inner.model_name or inner.outputs else None


def opened(reply: bytes, dialect: Dialect | None) -> tuple[Envelope, ModelInferResponse]:
    """A streamed message, and the reply in it: changes of the reply are changes of the message.

    Raises:
        DecodeError: It is none.
    """
    if dialect is Dialect.MLSERVER:
        plain = ModelInferResponse.FromString(reply)
        return plain, plain
    envelope = ModelStreamInferResponse.FromString(reply)
    return envelope, envelope.infer_response


def error_reply(message: str, *, model: str, request_id: str, like: ModelInferResponse | None = None) -> bytes:
    """An error in Triton's dialect.

    Args:
        message: For the client.
        model: Name of it.
        request_id: Of the request that it answers.
        like: The reply in whose place it comes; it ends what that would have ended.
    """
    envelope = ModelStreamInferResponse(error_message=message)
    envelope.infer_response.model_name, envelope.infer_response.id = model, request_id
    if like is not None and FINAL in like.parameters:
        envelope.infer_response.parameters[FINAL].CopyFrom(like.parameters[FINAL])
    return envelope.SerializeToString()
