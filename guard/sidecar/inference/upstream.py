"""Upstream mode: calls are forwarded to another inference server; inference requests are screened on the way."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from time import perf_counter

import grpc

from guard.errors import RequestError
from guard.protocol import DESCRIBING_METHODS, MODEL_CONTROL, SERVICE
from guard.protocol.dialects import StreamDialect
from guard.protocol.inference_pb2 import ModelInferResponse
from guard.protocol.messages import parse_request, parse_whole, remove_output, remove_own_names, with_output
from guard.protocol.wire import REPLY, REPLY_LIMITS, check_message
from guard.sidecar.decisions.routes import Request
from guard.sidecar.inference import bypass
from guard.sidecar.inference.annotations import edit_reply
from guard.sidecar.inference.calls import INFER, STREAM, Context, Metadata, RefusedError
from guard.sidecar.inference.proxy import Proxy
from guard.sidecar.inference.screener import Check, Screener, confirm, enforce, output_to_hide, tags
from guard.sidecar.inference.service import InferenceService, UnaryHandler
from guard.sidecar.inference.streaming import ScreenedStream
from guard.sidecar.policy import Outcome, Reason
from guard.sidecar.telemetry.tracing import server_span

_OWN_SERVICES = ("grpc.health.", "grpc.reflection.", "guard.")
"""Beginnings of the names of services that a sidecar answers itself, or not at all."""


class UpstreamService(InferenceService):
    """Proxies another inference server.

    Metadata of the reply are passed on, as are status codes and details, and of the request's metadata those that are
    known not to choose another model. The client's deadline is passed on as it is; a call without a deadline gets none.
    A request that the client cancels is cancelled upstream. Methods that describe the server are forwarded unread;
    `bypass` lists them. A call of any other method is an unchecked request.
    """

    def __init__(self, screener: Screener) -> None:
        super().__init__(screener)
        settings = screener.settings
        self._proxy = Proxy(settings)
        self._handlers = {
            INFER: self.unary(self.model_infer),
            STREAM: self.stream(self._model_stream_infer),
            **{path: self.unary(method) for path, method in self.methods().items()},
        }

    async def ready(self) -> bool:
        """Whether the upstream server says that it is ready."""
        return await self._proxy.ready()

    async def close(self) -> None:
        """Wait for the checks that run in the background, then close the connection to the upstream server."""
        await self._screener.close()
        await self._proxy.close()

    def methods(self) -> dict[str, UnaryHandler]:
        """The handlers of the five methods that are forwarded unread, by path."""
        paths = [f"/{SERVICE}/{name}" for name in DESCRIBING_METHODS]
        return {path: partial(self._forward, path) for path in paths}

    def handlers(self) -> grpc.GenericRpcHandler:
        """The gRPC handlers of every method except those of the sidecar's own services."""
        return _Router(self)

    def route(self, path: str) -> grpc.RpcMethodHandler | None:
        """The handler of a method; None if the sidecar answers the method itself."""
        if known := self._handlers.get(path):
            return known
        service, _, method = path.removeprefix("/").rpartition("/")
        if service.startswith(_OWN_SERVICES):
            return None
        if method in MODEL_CONTROL:  # in whichever service: MLServer has a second one with these methods
            return self.unary(partial(self._control_models, path))
        if method in bypass.SHARED_MEMORY:
            return self.unary(partial(self._register_shared_memory, path))
        if bypass.is_harmless(path, self._screener.settings.pass_methods):
            return self.stream(partial(self._relay, path))
        return self.stream(partial(self._relay_unknown, path))

    async def _forward(self, path: str, data: bytes, context: Context) -> bytes:
        reply, trailing = await self._proxy.unary(path, data, context)
        context.set_trailing_metadata(trailing)
        return reply

    async def _relay(self, path: str, requests: AsyncIterator[bytes], context: Context) -> None:
        context.set_trailing_metadata(await self._proxy.relay(path, requests, context))

    async def _control_models(self, path: str, data: bytes, context: Context) -> bytes:
        bypass.check_model_control(data, allowed=self._screener.settings.allow_model_control)
        return await self._forward(path, data, context)

    async def _register_shared_memory(self, path: str, data: bytes, context: Context) -> bytes:
        self._enforce(Outcome.unchecked(Reason.SHARED_MEMORY))
        return await self._forward(path, data, context)

    async def _relay_unknown(self, path: str, requests: AsyncIterator[bytes], context: Context) -> None:
        started, outcome, route = perf_counter(), Outcome.unchecked(Reason.PROTOCOL_UNKNOWN), self._route(None)
        try:
            self._enforce(outcome)
            await self._relay(path, requests, context)
        finally:
            self._screener.observe(outcome, route, 1, started)

    def _enforce(self, outcome: Outcome) -> None:
        """Refuse a call whose messages are not read, if the policy for unknown models says so."""
        route = self._screener.models.unknown
        enforce(outcome, route, tags(outcome, route))

    async def _model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        with server_span(STREAM, tuple(context.invocation_metadata() or ())), self._proxy.hop(STREAM, context) as hop:
            await self._screen_stream(hop, requests, context)

    async def _screen_stream(self, metadata: Metadata, requests: AsyncIterator[bytes], context: Context) -> None:
        active = self._screener.metrics.active
        active.inc()
        dialect = StreamDialect(self._screener.settings.stream_dialect, self._proxy.server_name)
        stream = ScreenedStream(self._screener, dialect, self._proxy.stream(STREAM, metadata, context), context)
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
                error.trailing = (*error.trailing, *tags(Outcome.unchecked(error.reason), stream.route))
            else:
                reason = Reason.CANCELLED
            raise
        finally:
            stream.give_up(reason)
            active.dec()

    async def infer(self, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        """Forward and screen a request; both run at the same time if guard embeds the images itself."""
        screener, data = self._screener, request.data
        if (known := screener.outcome_without_check(request)) is not None:
            # The request is refused before the upstream server works on it, or it is served unchecked.
            enforce(known, request.route)
            reply, response, trailing = await self._ask(data, request, context)
            return _finish(reply, response, request, known, trailing)
        if not request.route.embeds:
            return await self._infer_by_reply(request, context)
        check = Check(request)
        if request.route.settings.background and screener.models.is_current(request):
            # Nothing depends on the outcome, so the reply does not wait for it.
            screener.start_check(request, check.outcome())
            reply, trailing = await self._timed(data, request, context)
            return _without_own_names(reply), None, trailing
        assumed, running = request.route, asyncio.ensure_future(check.outcome())
        try:
            data = await check.data(running)
            context.hold(len(data) if data is not request.data else 0)
            reply, response, trailing = await self._ask(data, request, context)
            if (route := request.route) is not assumed:
                # Another version answered than the one that was assumed; it got what the first one was checked with.
                running.cancel()
                request.message = parse_request(data)
                again = (
                    Check(request).outcome() if route.embeds else screener.check_reply(response, request, None, data)
                )
                running = asyncio.ensure_future(again)
            return _finish(reply, response, request, await running, trailing)
        finally:
            running.cancel()

    async def _infer_by_reply(self, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        """Forward a request, and screen it by the embeddings in the reply.

        Its images are read only for a second opinion; then the server gets the pixels that the reference model gets.
        """
        screener, data, hide = self._screener, request.data, output_to_hide(request)
        check, preparing = screener.start_preparation(request)
        checking: asyncio.Future[Outcome] | None = None
        try:
            if check is not None:
                data = await check.data(preparing)
                context.hold((len(data) if data is not request.data else 0) + screener.prepared_bytes(request))
            asked = data if hide is None else with_output(data, hide)
            reply, response, trailing = await self._ask(asked, request, context)
            outcome = screener.check_reply(response, request, preparing, data)
            if not request.route.settings.background:
                return _finish(reply, response, request, await outcome, trailing, hide)
            checking = screener.start_check(request, outcome)
            return (_without_own_names(reply) if hide is None else _without(reply, hide)), None, trailing
        finally:
            if checking is None:
                preparing.cancel()

    async def _timed(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Metadata]:
        """Forward a request, and measure how long the server takes, also for an error."""
        started = perf_counter()
        try:
            return await self._proxy.unary(INFER, data, context)
        finally:
            request.upstream_seconds = perf_counter() - started

    async def _ask(
        self, data: bytes, request: Request, context: Context
    ) -> tuple[bytes, ModelInferResponse | None, Metadata]:
        """Forward a request and settle its route by the version that answers.

        Returns:
            The reply as bytes; the parsed reply, or None if it cannot be read whole; the trailing metadata.
        """
        reply, trailing = await self._timed(data, request, context)
        response = _parsed(reply)
        if response is not None:
            reply = response.SerializeToString() if remove_own_names(response) else reply
            self._screener.models.settle(request, response.model_version)
        return reply, response, trailing


class _Router(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc publishes no types
    def __init__(self, service: UpstreamService) -> None:
        self._service = service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._service.route(handler_call_details.method)


def _finish(
    reply: bytes,
    response: ModelInferResponse | None,
    request: Request,
    outcome: Outcome,
    trailing: Metadata,
    hide: str | None = None,
) -> tuple[bytes, Outcome, Metadata]:
    """The reply as the client gets it; one that cannot be read whole is forwarded as it is if the policy allows it."""
    outcome, mode = confirm(outcome, response, request), request.route.settings.mode
    if response is not None and edit_reply(response, outcome, mode, () if hide is None else (hide,)):
        reply = response.SerializeToString()
    return reply, outcome, trailing


def _parsed(reply: bytes) -> ModelInferResponse | None:
    """The parsed reply; None if the bytes are not a ModelInferResponse, have other fields, or are too dear to parse."""
    response = ModelInferResponse()
    try:
        check_message(reply, REPLY, REPLY_LIMITS)
    except RequestError:
        return None
    return response if parse_whole(response, reply) else None


def _without_own_names(reply: bytes) -> bytes:
    """A reply without parameters and outputs that have names of guard's own."""
    response = _parsed(reply)
    return reply if response is None or not remove_own_names(response) else response.SerializeToString()


def _without(reply: bytes, name: str) -> bytes:
    """A reply without one of its outputs; it is parsed again, since the first message is still being checked."""
    response = _parsed(reply)
    if response is None:
        return reply
    remove_output(response, name)
    return response.SerializeToString()
