"""Upstream mode: everything passes through; of inferences, requests are read and replies annotated or withheld."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from functools import partial
from random import SystemRandom
from time import perf_counter

import grpc
from google.protobuf.message import DecodeError

from guard.protocol import SERVICE
from guard.protocol.dialects import StreamDialect
from guard.protocol.inference_pb2 import ModelInferResponse
from guard.protocol.tensors import float_output, remove_output, uses_shared_memory, with_output
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.routes import Request
from guard.sidecar.inference import bypass
from guard.sidecar.inference.annotations import annotate
from guard.sidecar.inference.proxy import UNARY, Proxy
from guard.sidecar.inference.service import (
    Context,
    InferenceService,
    Metadata,
    RefusedError,
    UnaryHandler,
    confirm,
    count_images,
)
from guard.sidecar.inference.streaming import ScreenedStream
from guard.sidecar.policy import Mode, Outcome, Reason
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics

_INFER, _STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
_OWN = ("grpc.health.", "grpc.reflection.", "guard.")
"""Services that a sidecar answers itself."""


class UpstreamService(InferenceService):
    """Stands before another inference server.

    Metadata passes both ways, as do trailers, status codes and details; the client's deadline is passed on as it is,
    and none stays none; a cancelled request is cancelled upstream. Methods that guard does not know pass unread, with
    any number of messages each way; `bypass` lists those that do not.
    """

    def __init__(self, settings: Settings, models: Models, metrics: Metrics) -> None:
        super().__init__(settings, models, metrics)
        self._proxy = Proxy(settings)
        self._draw = SystemRandom().random
        """Decides which requests are checked; without a seed, so that nobody can know."""
        self._checks: set[asyncio.Task[Outcome]] = set()
        self._dialect = StreamDialect(settings.stream_dialect, self._proxy.server_name)
        self._handlers = {
            _INFER: self.unary(self.model_infer),
            _STREAM: self.stream(self._model_stream_infer),
            **{path: self.unary(method) for path, method in self.methods().items()},
        }

    async def ready(self) -> bool:
        """Whether the upstream server says that it is ready."""
        return await self._proxy.ready()

    async def close(self) -> None:
        """Let the checks on the side end, and close the connection too."""
        await asyncio.gather(*self._checks, return_exceptions=True)
        await self._proxy.close()

    def methods(self) -> dict[str, UnaryHandler]:
        """The five that pass through unread, by path."""
        paths = [f"/{SERVICE}/{name}" for name in UNARY]
        return {path: partial(self._forward, path) for path in paths if path != _INFER}

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers of every method but those of the sidecar's own services."""
        return _Router(self)

    def route(self, path: str) -> grpc.RpcMethodHandler | None:
        """The handler of a method; None if the sidecar answers it itself."""
        if known := self._handlers.get(path):
            return known
        service, _, method = path.removeprefix("/").rpartition("/")
        if service.startswith(_OWN):
            return None
        if method in bypass.MODEL_CONTROL:
            return self.unary(partial(self._control, path))
        if method in bypass.SHARED_MEMORY:
            return self.unary(partial(self._register, path))
        if service in bypass.OTHER_PROTOCOLS:
            return self.stream(partial(self._other_protocol, path))
        return self.stream(partial(self._relay, path))

    async def _forward(self, path: str, data: bytes, context: Context) -> bytes:
        reply, trailing = await self._proxy.unary(path, data, context)
        context.set_trailing_metadata(trailing)
        return reply

    async def _relay(self, path: str, requests: AsyncIterator[bytes], context: Context) -> None:
        context.set_trailing_metadata(await self._proxy.relay(path, requests, context))

    async def _control(self, path: str, data: bytes, context: Context) -> bytes:
        bypass.check_model_control(data, allowed=self.settings.allow_model_control)
        return await self._forward(path, data, context)

    async def _register(self, path: str, data: bytes, context: Context) -> bytes:
        self.enforce(Outcome.unchecked(Reason.SHARED_MEMORY), self.models.unknown)
        return await self._forward(path, data, context)

    async def _other_protocol(self, path: str, requests: AsyncIterator[bytes], context: Context) -> None:
        started, outcome = perf_counter(), Outcome.unchecked(Reason.PROTOCOL_UNKNOWN)
        try:
            self.enforce(outcome, self.models.unknown)
            await self._relay(path, requests, context)
        finally:
            self.observe(outcome, self.models.unknown, 1, started)

    async def _model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        self.metrics.active.inc()
        stream = ScreenedStream(self, self._dialect, self._proxy.stream(_STREAM, context), context)
        reason = Reason.UPSTREAM_FAILED
        try:
            trailing = await self._proxy.carry(
                stream.call, stream.replies, lambda: stream.upwards(requests), stream.downwards
            )
            context.set_trailing_metadata(trailing)
        except asyncio.CancelledError:
            reason = Reason.CANCELLED
            raise
        except RefusedError as error:
            if error.reason is Reason.UPSTREAM_FAILED:
                error.trailing = (*error.trailing, *self.tags(Outcome.unchecked(error.reason), stream.route))
            else:
                reason = Reason.CANCELLED
            raise
        finally:
            stream.give_up(reason)
            self.metrics.active.dec()

    async def infer(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        """Forward and screen; side by side where guard embeds the image itself."""
        if (known := self.beforehand(request)) is not None:
            # Refused before the upstream server works on it; or served as it is.
            self.enforce(known, request.route)
            reply, response, trailing = await self._ask(data, request, context)
            return self._finish(reply, response, request, known, trailing)
        if not request.route.embeds:
            hide = self.to_hide(request)
            data = data if hide is None else with_output(data, hide)
            reply, response, trailing = await self._ask(data, request, context)
            if not request.route.settings.background:
                outcome = await self.check_reply(response, request)
                return self._finish(reply, response, request, outcome, trailing, hide)
            self.start_check(request, self.check_reply(response, request))
            return (reply if hide is None else _without(reply, hide)), None, trailing
        if request.route.settings.background and self.models.is_current(request):
            # Nothing depends on the outcome, and the reply does not wait for it.
            self.start_check(request, self.check_request(request))
            reply, trailing = await self._proxy.unary(_INFER, data, context)
            return reply, None, trailing
        guess, check = request.route, asyncio.ensure_future(self.check_request(request))
        try:
            reply, response, trailing = await self._ask(data, request, context)
            if (route := request.route) is not guess:
                # Another version answered than the one that was taken.
                check.cancel()
                again = self.check_request(request) if route.embeds else self.check_reply(response, request)
                check = asyncio.ensure_future(again)
            return self._finish(reply, response, request, await check, trailing)
        finally:
            check.cancel()

    async def _ask(
        self, data: bytes, request: Request, context: Context
    ) -> tuple[bytes, ModelInferResponse | None, Metadata]:
        """Forward a request, and take the version that answers it; the reply as bytes and as a message."""
        reply, trailing = await self._proxy.unary(_INFER, data, context)
        response = _parsed(reply)
        if response is not None:
            self.models.settle(request, response.model_version)
        return reply, response, trailing

    def beforehand(self, request: Request) -> Outcome | None:
        """The outcome of a request that is not checked, as far as that is known before it is forwarded."""
        if request.route.checker is None:
            return Outcome.unchecked(Reason.MODEL_UNKNOWN)
        if uses_shared_memory(request.message):
            return Outcome.unchecked(Reason.SHARED_MEMORY)
        if request.route.unvetted is not None:
            return request.route.unvetted
        share = request.route.settings.checked_share
        # Where the version is open, another share may hold, or none.
        if share < 1 and self.models.is_current(request) and self._draw() >= share:
            return Outcome.unchecked(Reason.NOT_SAMPLED)
        return None

    @staticmethod
    def to_hide(request: Request) -> str | None:
        """The output that guard needs and the client did not list, if it lists any; it does not get it."""
        name, outputs = request.route.settings.embedding_output, request.message.outputs
        return name if outputs and all(output.name != name for output in outputs) else None

    def start_check(self, request: Request, checking: Coroutine[None, None, Outcome]) -> asyncio.Task[Outcome]:
        """Check a request on the side; the outcome is counted as soon as it is there, whoever waits for it."""
        started, images = perf_counter(), count_images(request.message, request.route.settings.input_tensor)

        async def check() -> Outcome:
            outcome = Outcome.unchecked(Reason.CANCELLED)
            try:
                outcome = await checking
            finally:
                self.observe(outcome, request.route, images, started)
            return outcome

        task = asyncio.ensure_future(check())
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)
        return task

    @staticmethod
    async def check_request(request: Request) -> Outcome:
        """Embed and screen the images of a request."""
        checker = request.route.checker
        return Outcome.unchecked(Reason.MODEL_UNKNOWN) if checker is None else await checker.check_request(request)

    async def check_reply(self, response: ModelInferResponse | None, request: Request) -> Outcome:
        """Screen the embeddings in a reply; None for one that cannot be read."""
        if response is not None:
            self.models.settle(request, response.model_version)
        checker, name = request.route.checker, request.route.settings.embedding_output
        if checker is None or name is None:
            return Outcome.unchecked(Reason.MODEL_UNKNOWN)
        if not self.settings.screening:
            return Outcome.unchecked(Reason.DISABLED)
        embeddings = None if response is None else float_output(response, name)
        if embeddings is None:
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, f"FP32 output {name!r}")
        rows = 1 if embeddings.ndim == 1 else len(embeddings)
        images = count_images(request.message, request.route.settings.input_tensor)
        if embeddings.ndim > 1 and rows != images:
            # An image without an embedding would go unscreened.
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, f"{rows} embeddings for {images} images")
        outcome = await checker.check_embeddings(embeddings.reshape(rows, -1), request)
        if outcome.reason is Reason.INPUT_UNREADABLE:
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, outcome.detail)
        return confirm(outcome, response, request)

    @staticmethod
    def edit(response: ModelInferResponse, request: Request, outcome: Outcome, hide: Iterable[str]) -> bool:
        """Annotate a reply, and take out outputs that the client did not ask for.

        Returns:
            Whether there was anything to do; if not, the bytes of the reply are still good.
        """
        hidden = [name for name in hide if remove_output(response, name)]
        tag = request.route.settings.mode is not Mode.SHADOW
        if tag:
            annotate(response, outcome, request.route.settings.mode)
        return bool(hidden) or tag

    def _finish(
        self,
        reply: bytes,
        response: ModelInferResponse | None,
        request: Request,
        outcome: Outcome,
        trailing: Metadata,
        hide: str | None = None,
    ) -> tuple[bytes, Outcome, Metadata]:
        """The reply as the client gets it; bytes that are no reply pass as they are."""
        outcome = confirm(outcome, response, request)
        if response is not None and self.edit(response, request, outcome, () if hide is None else (hide,)):
            reply = response.SerializeToString()
        return reply, outcome, trailing


class _Router(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc publishes no types
    def __init__(self, service: UpstreamService) -> None:
        self._service = service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._service.route(handler_call_details.method)


def _parsed(reply: bytes) -> ModelInferResponse | None:
    """A reply as a message; None if it is none."""
    try:
        return ModelInferResponse.FromString(reply)
    except DecodeError:
        return None


def _without(reply: bytes, name: str) -> bytes:
    """A reply without one of its outputs, read once more: the first reading is still being checked."""
    response = _parsed(reply)
    if response is None:
        return reply
    remove_output(response, name)
    return response.SerializeToString()
