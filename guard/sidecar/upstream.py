"""Upstream mode: everything passes through; of inferences, requests are read and replies annotated or withheld."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from time import perf_counter

import grpc
from google.protobuf.message import DecodeError

from guard.sidecar import bypass
from guard.sidecar.annotations import annotate
from guard.sidecar.checking import Checker
from guard.sidecar.dialects import StreamDialect
from guard.sidecar.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.sidecar.metrics import Metrics
from guard.sidecar.policy import FailurePolicy, Mode, Outcome, Reason
from guard.sidecar.proxy import UNARY, Proxy
from guard.sidecar.service import SERVICE, Context, InferenceService, Metadata, Method, count_images
from guard.sidecar.settings import Settings
from guard.sidecar.streaming import Stream
from guard.sidecar.tensors import float_output, remove_output, uses_shared_memory
from guard.sidecar.watch import Request

_INFER, _STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
_OWN = ("grpc.health.", "grpc.reflection.", "guard.")
"""Services that a sidecar answers itself."""


class UpstreamService(InferenceService):
    """Stands before another inference server.

    Metadata passes both ways, as do trailers, status codes and details; the client's deadline is passed on as it is,
    and none stays none; a cancelled request is cancelled upstream. Methods that guard does not know pass unread, with
    any number of messages each way; `bypass` lists those that do not.
    """

    def __init__(self, settings: Settings, checker: Checker, metrics: Metrics) -> None:
        super().__init__(settings, checker, metrics)
        self._proxy = Proxy(settings)
        self.embeds = settings.embedding_output is None
        """Whether guard embeds images itself."""
        self._checks: set[asyncio.Task[Outcome]] = set()
        self._dialect = StreamDialect(settings.stream_dialect, self._proxy)
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
        await super().close()
        await self._proxy.close()

    def methods(self) -> dict[str, Method]:
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
        self.enforce(Outcome.unchecked(Reason.SHARED_MEMORY))
        return await self._forward(path, data, context)

    async def _other_protocol(self, path: str, requests: AsyncIterator[bytes], context: Context) -> None:
        started, outcome = perf_counter(), Outcome.unchecked(Reason.PROTOCOL_UNKNOWN)
        try:
            self.enforce(outcome)
            await self._relay(path, requests, context)
        finally:
            self.metrics.observe(outcome, 1, perf_counter() - started)

    async def _model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        self.metrics.active.inc()
        try:
            stream = Stream(self, self._dialect, self._proxy.stream(_STREAM, context), context)
            trailing = await self._proxy.carry(
                stream.call, stream.replies, lambda: stream.upwards(requests), stream.downwards
            )
            context.set_trailing_metadata(trailing)
        finally:
            self.metrics.active.dec()

    async def infer(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        """Forward and screen; side by side where guard embeds the image itself."""
        if (known := self.beforehand(request.message)) is not None:
            # Refused before the upstream server works on it; or served as it is.
            self.enforce(known)
            reply, trailing = await self._proxy.unary(_INFER, data, context)
            return self._finish(reply, _parsed(reply), known, trailing)
        # In that case nothing depends on the outcome, and the reply does not wait for it.
        aside = self.settings.mode is Mode.SHADOW and self.settings.on_failure is FailurePolicy.OPEN
        if not self.embeds:
            hide = self.wants_embedding(request.message)
            reply, trailing = await self._proxy.unary(_INFER, self.with_embedding(data) if hide else data, context)
            response = _parsed(reply)
            if not aside:
                return self._finish(reply, response, await self.check_reply(response, request), trailing, hide=hide)
            self.start_check(request, self.check_reply(response, request))
            return (self._without_embedding(reply) if hide else reply), None, trailing
        if aside:
            self.start_check(request, self.check_request(request))
            reply, trailing = await self._proxy.unary(_INFER, data, context)
            return reply, None, trailing
        check = asyncio.ensure_future(self.check_request(request))
        try:
            reply, trailing = await self._proxy.unary(_INFER, data, context)
            return self._finish(reply, _parsed(reply), await check, trailing)
        finally:
            check.cancel()

    def _model_of(self, message: ModelInferRequest) -> Checker | None:
        """What screens the requests of a model; None if guard has no profile of it."""
        known = message.model_name == self.settings.name and message.model_version in {"", self.settings.version}
        return self.checker if known else None

    def beforehand(self, message: ModelInferRequest) -> Outcome | None:
        """The outcome of a request that cannot be checked, as far as that is known before it is forwarded."""
        if self._model_of(message) is None:
            return Outcome.unchecked(Reason.MODEL_UNKNOWN)
        if uses_shared_memory(message):
            return Outcome.unchecked(Reason.SHARED_MEMORY)
        return None

    def wants_embedding(self, message: ModelInferRequest) -> bool:
        """Whether the client listed outputs without the one that guard needs."""
        name = self.settings.embedding_output
        return name is not None and bool(message.outputs) and all(output.name != name for output in message.outputs)

    def with_embedding(self, data: bytes) -> bytes:
        """The same request with that output in its list: two messages one after the other are one, merged."""
        asked = ModelInferRequest()
        asked.outputs.add(name=self.settings.embedding_output)
        return data + asked.SerializeToString()

    def start_check(self, request: Request, checking: Coroutine[None, None, Outcome]) -> asyncio.Task[Outcome]:
        """Check a request on the side; the outcome is counted as soon as it is there, whoever waits for it."""
        started, images = perf_counter(), count_images(request.message, self.settings.input)

        async def check() -> Outcome:
            outcome = Outcome.unchecked(Reason.CANCELLED)
            try:
                outcome = await checking
            finally:
                self.observe(outcome, images, started)
            return outcome

        task = asyncio.ensure_future(check())
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)
        return task

    async def check_request(self, request: Request) -> Outcome:
        """Embed and screen the images of a request."""
        checker = self._model_of(request.message)
        return Outcome.unchecked(Reason.MODEL_UNKNOWN) if checker is None else await checker.check_request(request)

    async def check_reply(self, response: ModelInferResponse | None, request: Request) -> Outcome:
        """Screen the embeddings in a reply; None for one that cannot be read."""
        checker, name = self._model_of(request.message), self.settings.embedding_output
        if checker is None or name is None:
            return Outcome.unchecked(Reason.MODEL_UNKNOWN)
        if not self.settings.screening:
            return Outcome.unchecked(Reason.DISABLED)
        embeddings = None if response is None else float_output(response, name)
        if embeddings is None:
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, f"FP32 output {name!r}")
        rows = 1 if embeddings.ndim == 1 else len(embeddings)
        images = count_images(request.message, self.settings.input)
        if embeddings.ndim > 1 and rows != images:
            # An image without an embedding would go unscreened.
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, f"{rows} embeddings for {images} images")
        outcome = await checker.check_embeddings(embeddings.reshape(rows, -1), request)
        if outcome.reason is Reason.INPUT_UNREADABLE:
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, outcome.detail)
        return self.confirm(outcome, response)

    def confirm(self, outcome: Outcome, response: ModelInferResponse | None) -> Outcome:
        """The same outcome, unless the reply is of another version of the model than the profile."""
        version = self.settings.version
        if version is None or response is None or response.model_version in {"", version}:
            return outcome
        return max(outcome, Outcome.unchecked(Reason.MODEL_UNKNOWN), key=lambda each: each.severity)

    def edit(self, response: ModelInferResponse, outcome: Outcome, *, hide: bool) -> bool:
        """Annotate a reply, and take out an output that the client did not ask for.

        Returns:
            Whether there was anything to do; if not, the bytes of the reply are still good.
        """
        if hide and self.settings.embedding_output is not None:
            remove_output(response, self.settings.embedding_output)
        if self.settings.mode is not Mode.SHADOW:
            annotate(response, outcome, self.settings.mode)
        return hide or self.settings.mode is not Mode.SHADOW

    def _without_embedding(self, reply: bytes) -> bytes:
        response = _parsed(reply)
        if response is None or self.settings.embedding_output is None:
            return reply
        remove_output(response, self.settings.embedding_output)
        return response.SerializeToString()

    def _finish(
        self,
        reply: bytes,
        response: ModelInferResponse | None,
        outcome: Outcome,
        trailing: Metadata,
        *,
        hide: bool = False,
    ) -> tuple[bytes, Outcome, Metadata]:
        """The reply as the client gets it; bytes that are no reply pass as they are."""
        outcome = self.confirm(outcome, response)
        if response is not None and self.edit(response, outcome, hide=hide):
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
