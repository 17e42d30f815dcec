"""Back-pressure: requests beyond the limit are refused at once and not queued."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc

from guard.sidecar.telemetry.metrics import Metrics

SPARE = 64
"""Calls that the server accepts beyond the limit, so that it can answer probes and count refusals when it is full."""
_QUIET_SECONDS, _LONGEST_WAIT_SECONDS = 0.2, 2.0
"""Seconds without a new call after which no more are expected; and the most seconds that are spent waiting for that."""
Handler = Callable[[Any, grpc.aio.ServicerContext], Any]


class Limited(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Limits the number of calls that run at a time; further calls end with RESOURCE_EXHAUSTED.

    gRPC's own limit counts health checks too, and its refusals do not appear in the metrics. It remains as an outer
    bound, `SPARE` above this one, and applies before a message is read.

    Args:
        handlers: The handlers that are limited.
        most: The most calls that run at a time.
        metrics: Metrics of the sidecar, where refusals are counted.
    """

    def __init__(self, handlers: grpc.GenericRpcHandler, most: int, metrics: Metrics) -> None:
        self._handlers, self._most, self._metrics = handlers, most, metrics
        self._running = 0
        self._holding, self._released = False, asyncio.Event()
        self._call_arrived = asyncio.Event()

    async def hold(self) -> None:
        """Let new calls wait until `release`, while running calls go on; return when no more calls seem to arrive."""
        self._holding = True
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_WAIT_SECONDS):
                while True:
                    self._call_arrived.clear()
                    try:
                        await asyncio.wait_for(self._call_arrived.wait(), _QUIET_SECONDS)
                    except TimeoutError:
                        return

    def release(self) -> None:
        """End the calls that wait, with UNAVAILABLE."""
        self._released.set()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a call, within the limit."""
        handler = self._handlers.service(details)
        if handler is None:
            return None
        arity = "_".join(
            "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
        )
        # The handler is a named tuple.
        return handler._replace(**{arity: self._within_limit(getattr(handler, arity))})

    def _within_limit(self, method: Handler) -> Handler:
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
            self._call_arrived.set()
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
