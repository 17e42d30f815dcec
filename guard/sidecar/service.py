"""What both kinds of sidecar share: decisions become replies, refusals and metrics in one place."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import NoReturn, TypeAlias

import grpc

from guard.errors import RequestError
from guard.sidecar.annotations import trailers
from guard.sidecar.checking import Checker
from guard.sidecar.inference_pb2 import ModelInferRequest
from guard.sidecar.metrics import Metrics
from guard.sidecar.policy import MAX_MESSAGE, Mode, Outcome, Reason, refusal
from guard.sidecar.settings import Settings
from guard.sidecar.tensors import parse_request

SERVICE = "inference.GRPCInferenceService"
Context: TypeAlias = grpc.aio.ServicerContext
Method = Callable[[bytes, Context], Awaitable[bytes]]
Metadata = tuple[tuple[str, str | bytes], ...]

log = logging.getLogger(__name__)


class InferenceService(ABC):
    """The Open Inference Protocol, as bytes in and bytes out.

    Args:
        settings: Of the sidecar.
        checker: Screens the requests.
        metrics: Counted into.
    """

    def __init__(self, settings: Settings, checker: Checker, metrics: Metrics) -> None:
        self.settings, self.checker, self.metrics = settings, checker, metrics

    @abstractmethod
    async def ready(self) -> bool:
        """Whether inference requests can be served now."""

    @abstractmethod
    def methods(self) -> dict[str, Method]:
        """The handlers by method name, `ModelInfer` apart."""

    @abstractmethod
    async def infer(self, data: bytes, request: ModelInferRequest, context: Context) -> tuple[bytes, Outcome, Metadata]:
        """Answer one request.

        Returns:
            The reply, annotated if the mode says so; the outcome; trailing metadata to pass on.

        Raises:
            RequestError: The request is malformed.
        """

    async def close(self) -> None:
        """Release what the service holds."""
        self.checker.close()

    async def model_infer(self, data: bytes, context: Context) -> bytes:
        """`ModelInfer`: answer, decide, count."""
        started = perf_counter()
        outcome, images = Outcome.unchecked(Reason.ERROR), 0
        self.metrics.active.inc()
        try:
            try:
                request = parse_request(data)
                images = max(1, request.inputs[0].shape[0]) if request.inputs and request.inputs[0].shape else 1
                images = min(images, self.settings.max_batch)
                reply, outcome, trailing = await self.infer(data, request, context)
            except RequestError as error:
                outcome = Outcome.unchecked(Reason.INPUT_UNREADABLE)
                await self.abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"guard: {error}"[:MAX_MESSAGE])
            tags = () if self.settings.mode is Mode.SHADOW else trailers(outcome)
            if refused := refusal(outcome, self.settings.mode, self.settings.on_failure):
                await self.abort(context, refused.code, refused.message, (*trailing, *tags))
            context.set_trailing_metadata((*trailing, *tags))
            return reply
        finally:
            self.metrics.active.dec()
            self.metrics.observe(outcome, images, perf_counter() - started)

    async def abort(self, context: Context, code: grpc.StatusCode, message: str, trailing: Metadata = ()) -> NoReturn:
        """Refuse a request, and count it."""
        self.metrics.refused(code.name)
        await context.abort(code, message, trailing)
        raise AssertionError("abort always raises")

    def handlers(self) -> grpc.GenericRpcHandler:
        """The gRPC handlers of the service."""
        methods = {**self.methods(), "ModelInfer": self.model_infer}
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: grpc.unary_unary_rpc_method_handler(_guarded(method)) for name, method in methods.items()}
        )


def _guarded(method: Method) -> Method:
    """An unexpected error becomes INTERNAL with a fixed text: no traceback reaches a client."""

    async def call(data: bytes, context: Context) -> bytes:
        try:
            return await method(data, context)
        except (grpc.aio.AbortError, grpc.aio.AioRpcError):
            raise
        except Exception:
            log.exception("a request failed")
            await context.abort(grpc.StatusCode.INTERNAL, "guard: internal error")
            raise

    return call
