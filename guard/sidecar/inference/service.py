"""The inference service: decisions become replies, refusals and metrics in one place, embedded or upstream."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter

import grpc

from guard.errors import RequestError
from guard.protocol import SERVICE
from guard.sidecar.decisions.routes import Request, Route
from guard.sidecar.inference.calls import INFER, Context, Metadata, RefusedError
from guard.sidecar.inference.screener import Screener, count_images, enforce, malformed, tags
from guard.sidecar.policy import Mode, Outcome, Reason
from guard.sidecar.telemetry.tracing import Enforced, Span, server_span
from guard.sidecar.transport.loops import shielded

UnaryHandler = Callable[[bytes, Context], Awaitable[bytes]]
StreamHandler = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]

log = logging.getLogger(__name__)


class InferenceService(ABC):
    """The Open Inference Protocol, as bytes in and bytes out.

    Args:
        screener: Screens the requests.
    """

    def __init__(self, screener: Screener) -> None:
        self._screener = screener

    @abstractmethod
    async def ready(self) -> bool:
        """Whether inference requests can be served now."""

    @abstractmethod
    async def close(self) -> None:
        """Wait until everything that runs in the background has ended."""

    @abstractmethod
    def methods(self) -> dict[str, UnaryHandler]:
        """The handlers of all methods but `ModelInfer`, by method name."""

    @abstractmethod
    async def infer(self, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        """Answer one request.

        Returns:
            The reply, annotated if the mode says so; the outcome, or None if the outcome is not known yet, decides
            nothing and is counted elsewhere; trailing metadata to pass on.

        Raises:
            RequestError: The request is malformed.
            RefusedError: The request is answered with a status.
        """

    async def model_infer(self, data: bytes, context: Context) -> bytes:
        """Handle `ModelInfer`: answer the request, apply the policy, count the outcome."""
        with server_span(INFER, tuple(context.invocation_metadata() or ())) as span:
            return await self._infer_in(span, data, context)

    async def _infer_in(self, span: Span, data: bytes, context: Context) -> bytes:
        started = perf_counter()
        outcome: Outcome | None = Outcome.unchecked(Reason.ERROR)
        request, images, answered = None, 1, False
        self._screener.metrics.active.inc()
        try:
            request = self._screener.parse(data, context)
            images = count_images(request.message, request.route.settings.input_tensor)
            reply, outcome, trailing = await self._answer(request, context)
            if outcome is not None:
                enforce(outcome, request.route, trailing)
                trailing = (*trailing, *tags(outcome, request.route))
            context.set_trailing_metadata(trailing)
            answered = True
        except asyncio.CancelledError:
            outcome = Outcome.unchecked(Reason.CANCELLED)
            raise
        except RefusedError as error:
            if error.reason is not None:
                outcome = Outcome.unchecked(error.reason)
            if outcome is not None:
                error.trailing = (*error.trailing, *tags(outcome, self._route(request)))
            raise
        finally:
            self._screener.metrics.active.dec()
            route = self._route(request)
            span.describe(model=route.settings.label if request is not None else "", mode=route.settings.mode)
            if outcome is not None:
                self._screener.observe(outcome, route, images, started)
                annotated: Enforced = "none" if route.settings.mode is Mode.SHADOW else "annotated"
                span.decided(outcome, annotated if answered else "refused")
            if request is not None and request.upstream_seconds is not None:
                request.route.metrics.upstream(request.upstream_seconds, perf_counter() - started)
        return reply

    def _route(self, request: Request | None) -> Route:
        """The route of a request; that of unknown models if the request could not be parsed (None)."""
        return self._screener.models.unknown if request is None else request.route

    async def _answer(self, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        try:
            return await self.infer(request, context)
        except RequestError as error:
            raise malformed(error) from error

    def handlers(self) -> grpc.GenericRpcHandler:
        """The gRPC handlers of the service."""
        methods = {**self.methods(), "ModelInfer": self.model_infer}
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: self.unary(method) for name, method in methods.items()}
        )

    def unary(self, method: UnaryHandler) -> grpc.RpcMethodHandler:
        """A gRPC handler for calls with one message each way.

        This is where a refusal becomes a gRPC status and an unexpected error becomes INTERNAL: no traceback reaches a
        client.
        """

        async def call(data: bytes, context: Context) -> bytes:
            try:
                return await method(data, context)
            except Exception as error:  # noqa: BLE001 - `_end` logs it
                await self._end(error, context)
            raise AssertionError("abort always raises")

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(self, method: StreamHandler) -> grpc.RpcMethodHandler:
        """A gRPC handler for calls with any number of messages each way, including one."""

        async def call(_: AsyncIterator[bytes], context: Context) -> None:
            try:
                await method(_messages(context), context)
            except Exception as error:  # noqa: BLE001 - as above
                await self._end(error, context)

        return grpc.stream_stream_rpc_method_handler(call)

    async def _end(self, error: Exception, context: Context) -> None:
        """End a call with the status that belongs to an error."""
        if isinstance(error, grpc.aio.AbortError):
            raise error  # it is answered, and counted, already
        if context.done():
            # The client is gone, so that nothing can be written to it; that is not an error of guard.
            log.debug("a call ended before it was answered", exc_info=error)
            raise asyncio.CancelledError
        if isinstance(error, RefusedError):
            self._screener.metrics.refused(error.code.name)
            await context.abort(error.code, error.message, error.trailing)
        log.error("a request failed", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "guard: internal error")


async def _messages(context: Context) -> AsyncIterator[bytes]:
    """The messages that a client sends.

    A read ends when the call ends and is never cancelled: gRPC does not release a cancelled operation, and about
    100 bytes leak each time (measured with grpcio 1.85.1 and a bare server, whose own iterator is cancelled).
    """
    while True:
        message = await shielded(context.read())
        if message is grpc.aio.EOF:
            return
        yield message
