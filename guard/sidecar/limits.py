"""Back-pressure: more requests than a sidecar can work on are refused at once, not queued."""

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from guard.sidecar.metrics import Metrics

SPARE = 64
"""Calls that the server takes beyond the limit, so that probes are answered, and refusals counted, when it is full."""
Method = Callable[[Any, grpc.aio.ServicerContext], Any]


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

    def _counted(self, method: Method) -> Method:
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
        if self._running >= self._most:
            self._metrics.refused(grpc.StatusCode.RESOURCE_EXHAUSTED.name)
            message = f"guard: {self._most} requests are being answered, and no more are taken; try again later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
