"""Upstream mode: requests are forwarded as the bytes that came in; only `ModelInfer` is also read."""

import asyncio

import grpc
from google.protobuf.message import DecodeError

from guard.sidecar.annotations import annotate
from guard.sidecar.checking import Checker
from guard.sidecar.inference_pb2 import ModelInferResponse, ServerReadyRequest, ServerReadyResponse
from guard.sidecar.metrics import Metrics
from guard.sidecar.policy import Mode, Outcome, Reason
from guard.sidecar.service import SERVICE, Context, InferenceService, Metadata, Method, RefusedError
from guard.sidecar.settings import Settings
from guard.sidecar.tensors import float_output, remove_output
from guard.sidecar.watch import Request

FORWARDED = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
_OWN_HEADERS = frozenset({"user-agent", "te", "content-type"})
"""Metadata that belongs to one hop and is not passed on."""
_PROBE_SECONDS = 2.0


class UpstreamService(InferenceService):
    """Stands before another inference server.

    Metadata passes both ways, as do trailers, status codes and details; the client's deadline is passed on as it is,
    and none stays none; a cancelled request is cancelled upstream.
    """

    def __init__(self, settings: Settings, checker: Checker, metrics: Metrics) -> None:
        super().__init__(settings, checker, metrics)
        if settings.upstream is None:
            raise ValueError("an upstream service needs an upstream")
        self._channel = grpc.aio.insecure_channel(
            settings.upstream,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                # A server that restarts is found again within seconds, not after gRPC's default of two minutes.
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.initial_reconnect_backoff_ms", 200),
            ],
        )
        self._calls = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in (*FORWARDED, "ModelInfer")}

    async def ready(self) -> bool:
        """Whether the upstream server says that it is ready."""
        try:
            reply = await self._calls["ServerReady"](ServerReadyRequest().SerializeToString(), timeout=_PROBE_SECONDS)
            return bool(ServerReadyResponse.FromString(reply).ready)
        except (grpc.aio.AioRpcError, DecodeError):
            return False

    async def close(self) -> None:
        """Close the channel too."""
        await super().close()
        await self._channel.close()

    def methods(self) -> dict[str, Method]:
        """The five that pass through unread."""
        return {name: self._forwarder(name) for name in FORWARDED}

    def _forwarder(self, name: str) -> Method:
        async def forward(data: bytes, context: Context) -> bytes:
            reply, trailing = await self._forward(name, data, context)
            context.set_trailing_metadata(trailing)
            return reply

        return forward

    async def _forward(self, name: str, data: bytes, context: Context) -> tuple[bytes, Metadata]:
        """One call upstream; its error, if it is one, becomes the reply."""
        metadata = tuple((key, value) for key, value in context.invocation_metadata() or () if key not in _OWN_HEADERS)
        call = self._calls[name](data, metadata=metadata, timeout=context.time_remaining())
        try:
            reply = await call
            await context.send_initial_metadata(tuple(await call.initial_metadata()))
            return reply, tuple(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            details = error.details() or ""
            # The upstream server may itself say UNAVAILABLE, over a connection that stands.
            lost = self._channel.get_state() is not grpc.ChannelConnectivity.READY
            if error.code() is grpc.StatusCode.UNAVAILABLE and lost:
                details = f"guard: the upstream server {self.settings.upstream} cannot be reached ({details})"
            trailing = tuple(error.trailing_metadata() or ())
            raise RefusedError(error.code(), details, trailing=trailing, reason=Reason.UPSTREAM_FAILED) from error

    async def infer(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Outcome, Metadata]:
        """Forward and screen; side by side where guard embeds the image itself."""
        message = request.message
        if message.model_name != self.settings.name:
            reply, trailing = await self._forward("ModelInfer", data, context)
            return self._finish(reply, Outcome.unchecked(Reason.MODEL_UNKNOWN), trailing, hide=None)
        if self.settings.embedding_output is None:
            check = asyncio.ensure_future(self.checker.check_request(request))
            try:
                reply, trailing = await self._forward("ModelInfer", data, context)
                return self._finish(reply, await check, trailing, hide=None)
            finally:
                check.cancel()
        name = self.settings.embedding_output
        added = bool(message.outputs) and all(output.name != name for output in message.outputs)
        if added:
            message.outputs.add(name=name)
            data = message.SerializeToString()
        reply, trailing = await self._forward("ModelInfer", data, context)
        return self._finish(
            reply, await self._check_reply(reply, name, request), trailing, hide=name if added else None
        )

    async def _check_reply(self, reply: bytes, name: str, request: Request) -> Outcome:
        if not self.settings.screening:
            return Outcome.unchecked(Reason.DISABLED)
        try:
            embeddings = float_output(ModelInferResponse.FromString(reply), name)
        except DecodeError:
            embeddings = None
        if embeddings is None:
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, f"FP32 output {name!r}")
        rows = 1 if embeddings.ndim == 1 else len(embeddings)
        inputs = request.message.inputs
        images = inputs[0].shape[0] if inputs and inputs[0].shape else 1
        if embeddings.ndim > 1 and rows != images:
            # An image without an embedding would go unscreened.
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, f"{rows} embeddings for {images} images")
        outcome = await self.checker.check_embeddings(embeddings.reshape(rows, -1), request)
        if outcome.reason is Reason.INPUT_UNREADABLE:
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, outcome.detail)
        return outcome

    def _finish(
        self, reply: bytes, outcome: Outcome, trailing: Metadata, *, hide: str | None
    ) -> tuple[bytes, Outcome, Metadata]:
        """Annotate the reply, and take out an output that the client did not ask for; else leave its bytes alone."""
        if self.settings.mode is Mode.SHADOW and hide is None:
            return reply, outcome, trailing
        try:
            response = ModelInferResponse.FromString(reply)
        except DecodeError:
            return reply, outcome, trailing
        if hide is not None:
            remove_output(response, hide)
        if self.settings.mode is not Mode.SHADOW:
            annotate(response, outcome, self.settings.mode)
        return response.SerializeToString(), outcome, trailing
