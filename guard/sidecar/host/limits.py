"""Back-pressure: more requests than a sidecar can work on are refused at once, not queued."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc

from guard.sidecar.telemetry.metrics import Metrics

SPARE = 64
"""Calls that the server takes beyond the limit, so that probes are answered, and refusals counted, when it is full."""
_QUIET_SECONDS, _MOST_QUIET_SECONDS = 0.2, 2.0
"""Without a call, after which none is on its way; and that this is waited for at most."""
Handler = Callable[[Any, grpc.aio.ServicerContext], Any]


class Limited(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handlers of which at most some run at once; further calls end with RESOURCE_EXHAUSTED.

    gRPC's own limit counts health checks too, and refuses without a word to the metrics. It stays as the outer bound,
    `SPARE` above this one, and holds before a message is read.

    Args:
        handlers: What is limited.
        most: Calls at once.
        metrics: Where refusals are counted.
    """

    def __init__(self, handlers: grpc.GenericRpcHandler, most: int, metrics: Metrics) -> None:
        self._handlers, self._most, self._metrics = handlers, most, metrics
        self._running = 0
        self._holding, self._released = False, asyncio.Event()
        self._came = asyncio.Event()

    async def hold(self) -> None:
        """Take no more calls: they wait until `release`; those that run go on. Returns when no more seem to come."""
        self._holding = True
        with suppress(TimeoutError):
            async with asyncio.timeout(_MOST_QUIET_SECONDS):
                while True:
                    self._came.clear()
                    try:
                        await asyncio.wait_for(self._came.wait(), _QUIET_SECONDS)
                    except TimeoutError:
                        return

    def release(self) -> None:
        """Let those that wait end, with UNAVAILABLE."""
        self._released.set()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a call, counted."""
        handler = self._handlers.service(details)
        if handler is None:
            return None
        arity = "_".join(
            "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
        )
        # A named tuple.
        return handler._replace(**{arity: self._counted(getattr(handler, arity))})

    def _counted(self, method: Handler) -> Handler:
        if inspect.isasyncgenfunction(method):

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:  # noqa: ANN401
                async with self._slot(context), aclosing(method(request, context)) as replies:
                    async for reply in replies:
                        yield reply

            return stream

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: ANN401 - of any method
            async with self._slot(context):
                return await method(request, context)

        return call

    @asynccontextmanager
    async def _slot(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        if self._holding:
            self._came.set()
            await self._released.wait()
            self._metrics.refused(grpc.StatusCode.UNAVAILABLE.name)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "guard: this sidecar is shutting down; try another one")
        if self._running >= self._most:
            self._metrics.refused(grpc.StatusCode.RESOURCE_EXHAUSTED.name)
            message = f"guard: {self._most} requests are being answered, and no more are taken; try again later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
