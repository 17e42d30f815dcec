"""The two dialects of `ModelStreamInfer`: Triton wraps each reply in an envelope, MLServer sends plain replies."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from google.protobuf.message import DecodeError

from guard.protocol.inference_pb2 import ModelInferResponse, ModelStreamInferResponse
from guard.protocol.messages import parse_whole

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


@dataclass(frozen=True)
class StreamReply:
    """A message of a stream, as it is read in one dialect.

    Attributes:
        dialect: The dialect; None if it could be of both.
        message: The whole message.
        response: The reply in it; changes of the reply are changes of the message.
    """

    dialect: Dialect | None
    message: Envelope
    response: ModelInferResponse

    @property
    def answers(self) -> bool:
        """Whether it tells anything about an input; otherwise it is an error or the mark that ends several replies."""
        response = self.response
        return bool(response.outputs or response.raw_output_contents or set(response.parameters) - {FINAL})


class StreamDialect:
    """The dialect of one stream, which every single reply must have.

    If the setting is `auto`, the first reply that can be of one dialect only decides; every reply with an output is
    such a reply. Until then, the name in the server's metadata decides. Another stream may reach another server at the
    same address, so nothing is remembered beyond the stream.

    Args:
        setting: `auto`, or a dialect.
        server_name: Asks the upstream server for the name in its metadata.
    """

    def __init__(self, setting: str, server_name: Callable[[], Awaitable[str]]) -> None:
        self._known = None if setting == "auto" else Dialect(setting)
        self._server_name = server_name

    def read(self, reply: bytes) -> StreamReply | None:
        """Read a message of the stream; None if it cannot be read whole in the dialect of the stream.

        A message that fits both dialects, because it is little more than two strings, is taken for an envelope if
        there is anything in it: no version of a model looks like a reply.
        """
        readings = [
            reading for dialect in Dialect if self._known in {None, dialect} and (reading := _read(reply, dialect))
        ]
        if not any(reading.answers for reading in readings) and _might_answer(reply):
            # Little more than two strings, of which one is an envelope with fields that guard does not know.
            return None
        if not readings:
            return None
        found = readings[0]  # of Triton, if there are two
        if len(readings) == 2 and not found.response.ByteSize():
            return StreamReply(None, found.message, found.response)
        self._known = found.dialect
        return found

    async def ask(self) -> Dialect | None:
        """The dialect before any reply; None if the server's name is neither that of Triton nor that of MLServer."""
        if self._known is None:
            name = (await self._server_name()).lower()
            return next((dialect for dialect in Dialect if dialect in name), None)
        return self._known


def _read(reply: bytes, dialect: Dialect) -> StreamReply | None:
    """Read a message in a dialect; None if it is none of that dialect, or has fields that the dialect does not have.

    The envelope has the fields 1 (a string) and 2 (a reply). In a plain reply these are the name and the version of the
    model, and its id, parameters and outputs have higher numbers, which are unknown fields of an envelope.
    """
    if dialect is Dialect.MLSERVER:
        plain = ModelInferResponse()
        return StreamReply(dialect, plain, plain) if parse_whole(plain, reply) else None
    envelope = ModelStreamInferResponse()
    return StreamReply(dialect, envelope, envelope.infer_response) if parse_whole(envelope, reply) else None


def _might_answer(reply: bytes) -> bool:
    """Whether a client that passes over fields which it does not know finds outputs, in either dialect."""
    for read in (ModelInferResponse.FromString, lambda data: ModelStreamInferResponse.FromString(data).infer_response):
        try:
            response = read(reply)
        except DecodeError:
            continue
        if response.outputs or response.raw_output_contents:
            return True
    return False


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
