"""What both kinds of sidecar share: decisions become replies, refusals and metrics in one place."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TypeAlias

import grpc

from guard.errors import RequestError
from guard.sidecar.annotations import trailers
from guard.sidecar.checking import Checker
from guard.sidecar.inference_pb2 import ModelInferRequest
from guard.sidecar.metrics import Metrics
from guard.sidecar.policy import MAX_MESSAGE, Mode, Outcome, Reason, refusal
from guard.sidecar.settings import Settings
from guard.sidecar.tensors import parse_request
from guard.sidecar.watch import Request, trace_id

SERVICE = "inference.GRPCInferenceService"
Context: TypeAlias = grpc.aio.ServicerContext
Method = Callable[[bytes, Context], Awaitable[bytes]]
Metadata = tuple[tuple[str, str | bytes], ...]

log = logging.getLogger(__name__)


class RefusedError(Exception):
    """A request is answered with a status instead of a reply.

    Args:
        code: gRPC status.
        message: For the client.
        trailing: Metadata that goes with it.
        reason: Why it could not be checked, if that is why it is refused.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, *, trailing: Metadata = (), reason: Reason | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.trailing, self.reason = code, message, trailing, reason


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
    async def infer(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Outcome, Metadata]:
        """Answer one request.

        Returns:
            The reply, annotated if the mode says so; the outcome; trailing metadata to pass on.

        Raises:
            RequestError: The request is malformed.
            RefusedError: It is answered with a status.
        """

    async def close(self) -> None:
        """Release what the service holds."""
        self.checker.close()

    async def model_infer(self, data: bytes, context: Context) -> bytes:
        """`ModelInfer`: answer, decide, count."""
        started = perf_counter()
        outcome, images = Outcome.unchecked(Reason.ERROR), 1
        self.metrics.active.inc()
        try:
            request = parse_request(data)
            images = _count_images(request, self.settings.max_batch)
            origin = Request(request, trace_id(dict(context.invocation_metadata() or ())))
            reply, outcome, trailing = await self.infer(data, origin, context)
            context.set_trailing_metadata(self._enforce(outcome, trailing))
        except asyncio.CancelledError:
            outcome = Outcome.unchecked(Reason.CANCELLED)
            raise
        except RequestError as error:
            outcome = Outcome.unchecked(Reason.INPUT_UNREADABLE)
            message = f"guard: {error}"[:MAX_MESSAGE]
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message) from error
        except RefusedError as error:
            if error.reason is not None:
                outcome = Outcome.unchecked(error.reason)
            raise
        finally:
            self.metrics.active.dec()
            self.metrics.observe(outcome, images, perf_counter() - started)
        return reply

    def _enforce(self, outcome: Outcome, trailing: Metadata) -> Metadata:
        """Refuse what the policy refuses; the trailing metadata of what it serves."""
        tags = () if self.settings.mode is Mode.SHADOW else trailers(outcome)
        if refused := refusal(outcome, self.settings.mode, self.settings.on_failure):
            raise RefusedError(refused.code, refused.message, trailing=(*trailing, *tags))
        return (*trailing, *tags)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The gRPC handlers of the service."""
        methods = {**self.methods(), "ModelInfer": self.model_infer}
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {name: grpc.unary_unary_rpc_method_handler(self._guarded(method)) for name, method in methods.items()},
        )

    def _guarded(self, method: Method) -> Method:
        """Where refusals become gRPC status, and an unexpected error INTERNAL: no traceback reaches a client."""

        async def call(data: bytes, context: Context) -> bytes:
            try:
                return await method(data, context)
            except RefusedError as error:
                self.metrics.refused(error.code.name)
                await context.abort(error.code, error.message, error.trailing)
            except Exception:
                log.exception("a request failed")
                await context.abort(grpc.StatusCode.INTERNAL, "guard: internal error")
            raise AssertionError("abort always raises")

        return call


def _count_images(request: ModelInferRequest, most: int) -> int:
    """How many images a request says that it carries, for counting those that were not checked."""
    rows = request.inputs[0].shape[0] if request.inputs and request.inputs[0].shape else 1
    return min(max(rows, 1), most)
