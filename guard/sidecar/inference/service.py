"""What both kinds of sidecar share: decisions become replies, refusals and metrics in one place."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter
from typing import TypeAlias

import grpc

from guard.errors import RequestError
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.protocol.tensors import parse_request
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.routes import Request, Route
from guard.sidecar.decisions.watch import trace_id
from guard.sidecar.inference.annotations import trailers
from guard.sidecar.policy import MAX_MESSAGE, Decision, Mode, Outcome, Reason, refusal
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry import logs
from guard.sidecar.telemetry.metrics import Metrics
from guard.sidecar.transport.loops import shielded

Context: TypeAlias = grpc.aio.ServicerContext
UnaryHandler = Callable[[bytes, Context], Awaitable[bytes]]
StreamHandler = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]
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
        models: What screens the requests.
        metrics: Counted into.
    """

    def __init__(self, settings: Settings, models: Models, metrics: Metrics) -> None:
        self.settings, self.models, self.metrics = settings, models, metrics

    @abstractmethod
    async def ready(self) -> bool:
        """Whether inference requests can be served now."""

    @abstractmethod
    async def close(self) -> None:
        """Let what runs on the side end."""

    @abstractmethod
    def methods(self) -> dict[str, UnaryHandler]:
        """The handlers by method name, `ModelInfer` apart."""

    @abstractmethod
    async def infer(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        """Answer one request.

        Returns:
            The reply, annotated if the mode says so; the outcome, or None if it is still to come, decides nothing and
            is counted elsewhere; trailing metadata to pass on.

        Raises:
            RequestError: The request is malformed.
            RefusedError: It is answered with a status.
        """

    async def model_infer(self, data: bytes, context: Context) -> bytes:
        """`ModelInfer`: answer, decide, count."""
        started = perf_counter()
        outcome: Outcome | None = Outcome.unchecked(Reason.ERROR)
        request, images = None, 1
        self.metrics.active.inc()
        try:
            request = self.parse(data, context)
            images = count_images(request.message, request.route.settings.input_tensor)
            reply, outcome, trailing = await self._answer(data, request, context)
            if outcome is not None:
                self.enforce(outcome, request.route, trailing)
                trailing = (*trailing, *self.tags(outcome, request.route))
            context.set_trailing_metadata(trailing)
        except asyncio.CancelledError:
            outcome = Outcome.unchecked(Reason.CANCELLED)
            raise
        except RefusedError as error:
            if error.reason is not None:
                outcome = Outcome.unchecked(error.reason)
            if outcome is not None:
                error.trailing = (*error.trailing, *self.tags(outcome, self._route(request)))
            raise
        finally:
            self.metrics.active.dec()
            if outcome is not None:
                self.observe(outcome, self._route(request), images, started)
        return reply

    def _route(self, request: Request | None) -> Route:
        """What holds for a request that may be none."""
        return self.models.unknown if request is None else request.route

    def observe(self, outcome: Outcome, route: Route, images: int, started: float) -> None:
        """Count an outcome; what a client claims to have sent counts up to the limit."""
        route.metrics.observe(outcome, min(images, self.settings.max_batch), perf_counter() - started)

    def parse(self, data: bytes, context: Context) -> Request:
        """Read a request, find what holds for it, and name it in the log.

        Raises:
            RefusedError: The bytes are none.
        """
        try:
            message = parse_request(data)
        except RequestError as error:
            raise _malformed(error) from error
        route = self.models.route(message.model_name, message.model_version)
        request = Request(message, route, trace_id(dict(context.invocation_metadata() or ())))
        logs.follow(message.id, request.trace_id)
        return request

    async def _answer(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Outcome | None, Metadata]:
        try:
            return await self.infer(data, request, context)
        except RequestError as error:
            raise _malformed(error) from error

    @staticmethod
    def enforce(outcome: Outcome, route: Route, trailing: Metadata = ()) -> None:
        """Refuse what the policy of a model refuses.

        Raises:
            RefusedError: This is refused; with the trailing metadata that was to go with the reply.
        """
        if refused := refusal(outcome, route.settings.mode, route.settings.on_failure):
            reason = outcome.reason if outcome.decision is Decision.UNCHECKED else None
            raise RefusedError(refused.code, refused.message, trailing=trailing, reason=reason)

    @staticmethod
    def tags(outcome: Outcome, route: Route) -> Metadata:
        """What trailing metadata say of an outcome."""
        return () if route.settings.mode is Mode.SHADOW else trailers(outcome)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The gRPC handlers of the service."""
        methods = {**self.methods(), "ModelInfer": self.model_infer}
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: self.unary(method) for name, method in methods.items()}
        )

    def unary(self, method: UnaryHandler) -> grpc.RpcMethodHandler:
        """A handler of one message each way.

        This is where refusals become gRPC status, and an unexpected error INTERNAL: no traceback reaches a client.
        """

        async def call(data: bytes, context: Context) -> bytes:
            try:
                return await method(data, context)
            except Exception as error:  # noqa: BLE001 - it is logged where it ends
                await self._end(error, context)
            raise AssertionError("abort always raises")

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(self, method: StreamHandler) -> grpc.RpcMethodHandler:
        """A handler of any number of messages each way; it also serves calls of one message."""

        async def call(_: AsyncIterator[bytes], context: Context) -> None:
            try:
                await method(_messages(context), context)
            except Exception as error:  # noqa: BLE001 - as above
                await self._end(error, context)

        return grpc.stream_stream_rpc_method_handler(call)

    async def _end(self, error: Exception, context: Context) -> None:
        if context.done():
            # The client went away, so that nothing can be written to it; that is not a fault of guard's.
            log.debug("a call ended before it was answered", exc_info=error)
            raise asyncio.CancelledError
        if isinstance(error, RefusedError):
            self.metrics.refused(error.code.name)
            await context.abort(error.code, error.message, error.trailing)
        log.error("a request failed", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "guard: internal error")


async def _messages(context: Context) -> AsyncIterator[bytes]:
    """What a client sends.

    Reading ends by itself when the call does, and is never cancelled: gRPC would not take its operation back, and lose
    about 100 bytes each time (measured with grpcio 1.85.1 and a bare server, whose own iterator is cancelled).
    """
    while True:
        message = await shielded(context.read())
        if message is grpc.aio.EOF:
            return
        yield message


def _malformed(error: RequestError) -> RefusedError:
    message = f"guard: {error}"[:MAX_MESSAGE]
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message, reason=Reason.INPUT_UNREADABLE)


def count_images(request: ModelInferRequest, name: str) -> int:
    """How many images a request says that it carries in the input of that name, or else in its first one."""
    tensor = next((tensor for tensor in request.inputs if tensor.name == name), None)
    tensor = tensor or (request.inputs[0] if request.inputs else None)
    return max(int(tensor.shape[0]), 1) if tensor is not None and tensor.shape else 1


def confirm(outcome: Outcome, response: ModelInferResponse | None, request: Request) -> Outcome:
    """The same outcome, unless the reply is of another version of the model than the profile."""
    version = request.route.settings.model_version
    if version is None or response is None or response.model_version in {"", version}:
        return outcome
    return max(outcome, Outcome.unchecked(Reason.MODEL_UNKNOWN), key=lambda each: each.severity)
