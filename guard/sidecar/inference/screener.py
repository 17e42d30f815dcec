"""Screening of inference requests, shared by unary calls and streams."""

import asyncio
from collections.abc import Coroutine
from random import SystemRandom
from time import perf_counter
from typing import Any

import grpc

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.protocol.messages import parse_request, remove_own_names, uses_shared_memory
from guard.protocol.tensors import float_output
from guard.protocol.wire import REQUEST, Limits, check_message
from guard.sidecar.decisions.checking import Checker, Prepared
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.routes import Request, Route
from guard.sidecar.decisions.watch import trace_id
from guard.sidecar.inference.annotations import trailers
from guard.sidecar.inference.calls import Context, Metadata, RefusedError
from guard.sidecar.policy import MAX_MESSAGE, Decision, Mode, Outcome, Reason, refusal
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry import logs
from guard.sidecar.telemetry.metrics import Metrics
from guard.sidecar.telemetry.tracing import check_span, current_trace, tracer

LEAST_ELEMENTS = 1024
"""Elements of all BYTES inputs of a request that are taken in any case; else four times `max_batch`."""
_END_SECONDS = 0.5
"""Seconds that checks in the background are given to end when the sidecar ends."""


class Screener:
    """Reads inference requests, finds out what the policy needs to know about them, and counts the outcomes.

    Args:
        settings: Settings of the sidecar.
        models: The models that screen the requests.
        metrics: Metrics of the sidecar.

    Attributes:
        settings: As given.
        models: As given.
        metrics: As given.
    """

    def __init__(self, settings: Settings, models: Models, metrics: Metrics) -> None:
        self.settings, self.models, self.metrics = settings, models, metrics
        self._wire_limits = Limits(elements=max(LEAST_ELEMENTS, 4 * settings.max_batch))
        # Without a seed, so that nobody can predict which requests are checked.
        self._draw = SystemRandom().random
        self._running: set[asyncio.Task[Any]] = set()
        tracer()  # loaded now, so that the first request does not wait for it

    async def close(self) -> None:
        """Wait for the checks that run in the background; those that hang are cancelled."""
        if self._running:
            await asyncio.wait(self._running, timeout=_END_SECONDS)
        for check in self._running:
            check.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def parse(self, data: bytes, context: Context) -> Request:
        """Parse a request, find its route, and make its ids known to the log.

        Raises:
            RefusedError: The bytes are not a ModelInferRequest.
        """
        try:
            check_message(data, REQUEST, self._wire_limits)
            message = parse_request(data)
        except RequestError as error:
            raise malformed(error) from error
        if remove_own_names(message):
            data = message.SerializeToString()
        route = self.models.route(message.model_name, message.model_version)
        request = Request(message, data, route, current_trace() or trace_id(dict(context.invocation_metadata() or ())))
        logs.follow(message.id, request.trace_id)
        return request

    def observe(self, outcome: Outcome, route: Route, images: int, started: float) -> None:
        """Count an outcome in the metrics of its model.

        Args:
            outcome: The outcome of one request.
            route: The route of the request.
            images: The number of images that the client claims to have sent; it is counted up to `max_batch`.
            started: When the request arrived, by `perf_counter`.
        """
        route.metrics.observe(outcome, min(images, self.settings.max_batch), perf_counter() - started)

    def outcome_without_check(self, request: Request) -> Outcome | None:
        """The outcome of a request that is not going to be checked; None if the request is to be checked."""
        if request.route.checker is None:
            return Outcome.unchecked(Reason.MODEL_UNKNOWN)
        if uses_shared_memory(request.message):
            return Outcome.unchecked(Reason.SHARED_MEMORY)
        if request.route.barred is not None:
            return request.route.barred
        if request.route.embeds and self.settings.screening:
            try:
                request.route.checker.find_input(request.message)
            except RequestError as error:
                return Outcome.unchecked(Reason.INPUT_UNREADABLE, str(error))
        share = request.route.settings.checked_share
        # While the version is open, another version may answer, whose share may be different or 1.
        if share < 1 and self.models.is_current(request) and self._draw() >= share:
            return Outcome.unchecked(Reason.NOT_SAMPLED)
        return None

    def start_check(self, request: Request, checking: Coroutine[None, None, Outcome]) -> asyncio.Task[Outcome]:
        """Check a request in the background; its outcome is counted when the check ends, whoever waits for it."""
        started, images = perf_counter(), count_images(request.message, request.route.settings.input_tensor)

        async def check() -> Outcome:
            outcome = Outcome.unchecked(Reason.CANCELLED)
            with check_span() as span:
                try:
                    outcome = await checking
                finally:
                    self.observe(outcome, request.route, images, started)
                    span.describe(model=request.route.settings.label, mode=request.route.settings.mode)
                    span.decided(outcome, "none")
            return outcome

        task = asyncio.ensure_future(check())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def start_preparation(self, request: Request) -> "tuple[Check | None, asyncio.Future[Prepared]]":
        """Read the images of a request whose embeddings come with the reply, and ask the reference model about them.

        Returns:
            What knows which images are forwarded, None if the request is forwarded as it was sent; and what is known of
            the request when the future is done.
        """
        checker = request.route.checker
        if checker is None:
            raise ValueError("a request for an unknown model is not prepared")
        if not checker.draw():
            known: asyncio.Future[Prepared] = asyncio.get_running_loop().create_future()
            known.set_result(Prepared(checker))
            return None, known
        check = Check(request)
        task = asyncio.ensure_future(check.prepare(checker))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return check, task

    @staticmethod
    def prepared_bytes(request: Request, message: int = 0) -> int:
        """Bytes that what is prepared for a request takes until its reply; see `Checker.prepared_bytes`."""
        checker, name = request.route.checker, request.route.settings.input_tensor
        return 0 if checker is None else checker.prepared_bytes(count_images(request.message, name), message)

    async def check_reply(
        self,
        response: ModelInferResponse | None,
        request: Request,
        preparing: "asyncio.Future[Prepared] | None",
        forwarded: bytes | None = None,
    ) -> Outcome:
        """Screen the embeddings that a reply carries.

        Args:
            response: The reply; None if it could not be parsed.
            request: The request.
            preparing: What is known of its images when it is done; None if nothing was prepared.
            forwarded: The request as it was forwarded, from which images are read again if another version answered
                than the one that was assumed; None if it is not kept.
        """
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
        if rows != images:
            # An image without an embedding would not be screened.
            return Outcome.unchecked(Reason.EMBEDDING_MISSING, f"{rows} embeddings for {images} images")
        prepared = None if preparing is None else await preparing
        if prepared is None or prepared.checker is not checker:
            # Another version answered, or it is not known which request the reply belongs to.
            missing = Reason.REPLY_UNMATCHED if prepared is None else Reason.MODEL_UNKNOWN
            prepared = await _prepared_anew(checker, forwarded, missing)
        outcome = await checker.check_embeddings(
            embeddings.reshape(rows, -1), request.message, request.trace_id, prepared
        )
        return confirm(outcome, response, request)


class Check:
    """A check of a request whose images guard reads.

    Args:
        request: The request.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        settings = request.route.settings
        self._waits = settings.canonical and any(tensor.datatype == "BYTES" for tensor in request.message.inputs)
        self._canonical: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def forward(data: bytes) -> None:
            loop.call_soon_threadsafe(self._canonical.set_result, data)

        self._forward = forward if settings.canonical else None

    async def outcome(self) -> Outcome:
        """The outcome of a request whose images guard embeds itself."""
        request = self._request
        if request.route.checker is None:
            return Outcome.unchecked(Reason.MODEL_UNKNOWN)
        return await request.route.checker.check_request(request.message, request.trace_id, self._forward)

    async def prepare(self, checker: Checker) -> Prepared:
        """What is known of a request before the upstream server's embeddings are."""
        return await checker.prepare(self._request.message, self._forward)

    async def data(self, running: "asyncio.Future[Outcome] | asyncio.Future[Prepared]") -> bytes:
        """The request as it is to be forwarded, with the pixels that are checked in place of encoded images.

        Args:
            running: The task that runs the check, or its preparation. If it ends before anything could be read, what
                was sent is forwarded.

        Raises:
            RefusedError: Nothing could be read, and the policy refuses such a request.
        """
        if not self._waits:
            # Written anew where it matters, so that the server reads no other message from the same bytes.
            written: bytes = self._request.data
            if self._request.route.settings.canonical:
                written = self._request.message.SerializeToString()
            return written
        waiting: set[asyncio.Future[Any]] = {self._canonical, running}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._canonical.done():
            return self._canonical.result()
        result = running.result()
        failed = result.failed if isinstance(result, Prepared) else result
        if failed is not None:
            enforce(failed, self._request.route)
        return self._request.data


async def _prepared_anew(checker: Checker, forwarded: bytes | None, missing: Reason) -> Prepared:
    """What a checker knows of the images of a request that it did not prepare.

    Args:
        checker: The checker.
        forwarded: The request as it was forwarded; None if it is not kept.
        missing: The reason if it is not.
    """
    if not checker.draw():
        return Prepared(checker)
    if forwarded is None:
        return checker.unprepared(Outcome.unchecked(missing, "its images are not there to be compared"))
    return await checker.prepare(parse_request(forwarded))


def confirm(outcome: Outcome, response: ModelInferResponse | None, request: Request) -> Outcome:
    """The same outcome, or a worse one if the reply does not show that it is of the model that the profile is of.

    Args:
        outcome: The outcome of the request.
        response: The reply; None if it cannot be read whole.
        request: The request.
    """
    if response is None:
        return outcome.doubted(Reason.PROTOCOL_UNKNOWN, "the reply of the upstream server cannot be read")
    versions = {request.message.model_version, request.route.settings.model_version} - {"", None}
    same_model = response.model_name in {"", request.message.model_name}
    same_version = not response.model_version or versions <= {response.model_version}
    return outcome if same_model and same_version else outcome.doubted(Reason.MODEL_UNKNOWN)


def enforce(outcome: Outcome, route: Route, trailing: Metadata = ()) -> None:
    """Refuse a request if the policy of its model refuses this outcome.

    Args:
        outcome: The outcome of the request.
        route: The route of the request.
        trailing: Trailing metadata of the reply, which the refusal carries too.

    Raises:
        RefusedError: The request is refused.
    """
    if refused := refusal(outcome, route.settings.mode, route.settings.on_failure):
        reason = outcome.reason if outcome.decision is Decision.UNCHECKED else None
        raise RefusedError(refused.code, refused.message, trailing=trailing, reason=reason)


def tags(outcome: Outcome, route: Route) -> Metadata:
    """The trailing metadata that tell the client about an outcome; none in shadow mode."""
    return () if route.settings.mode is Mode.SHADOW else trailers(outcome)


def output_to_hide(request: Request) -> str | None:
    """The output that guard asks for in addition, and removes from the reply.

    It is the embedding, if the client lists outputs and does not list that one; None otherwise.
    """
    name, outputs = request.route.settings.embedding_output, request.message.outputs
    return name if outputs and all(output.name != name for output in outputs) else None


def count_images(request: ModelInferRequest, name: str) -> int:
    """The number of images that a request claims to carry, in the input of that name or else in its first input."""
    tensor = next((tensor for tensor in request.inputs if tensor.name == name), None)
    tensor = tensor or (request.inputs[0] if request.inputs else None)
    return max(int(tensor.shape[0]), 1) if tensor is not None and tensor.shape else 1


def malformed(error: RequestError) -> RefusedError:
    """The refusal of a request that cannot be read."""
    message = f"guard: {error}"[:MAX_MESSAGE]
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message, reason=Reason.INPUT_UNREADABLE)
