"""Decode, embed and screen the images of a request."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers import ExportedClassifier, decode, decode_unambiguous, encode
from guard.classifiers.headers import read_headers
from guard.errors import ImageError, RequestError
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import with_images
from guard.protocol.tensors import encoded_images, find_input, float_images, raw_contents
from guard.screening import Detector
from guard.sidecar.decisions.reservoir import Reservoir
from guard.sidecar.decisions.watch import Shared, Watch
from guard.sidecar.decisions.workers import LargeWorkError, OverloadedError, checkpoint
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Decision, Outcome, Reason
from guard.sidecar.telemetry.metrics import ModelMetrics

T = TypeVar("T")
LARGE_PIXELS = 16_000_000
"""Requests with more pixels to decode are large: not every thread takes them. A camera's picture is still below."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """The result of one forward pass through the exported classifier.

    Attributes:
        logits: Class scores, shape [N, C].
        outcome: The decision about the images.
    """

    logits: Floats
    outcome: Outcome


@dataclass(frozen=True, eq=False)
class _Claims:
    """What a request claims to hold, before anything is decoded.

    Attributes:
        index: Number of the input with the images.
        where: How errors name that input.
        files: The encoded images; None if the images are preprocessed.
        work: Pixels that decoding them visits.
        troubles: Why images cannot be read, by their numbers; completed while they are decoded.
    """

    index: int
    where: str
    files: list[bytes] | None
    work: int
    troubles: dict[int, ImageError]

    @property
    def trouble(self) -> str:
        """Why the first of the images that cannot be read cannot be; "" if all can."""
        if not self.troubles:
            return ""
        first = min(self.troubles)
        which = f"image {first} of the batch: " if self.files is not None and len(self.files) > 1 else ""
        return f"{self.where}{which}{self.troubles[first]}"

    def in_turn(self, rest: Callable[[], T]) -> T:
        """Do what is left to do, now or, if decoding takes long, when a thread for large work is free."""
        if self.work > LARGE_PIXELS:
            raise LargeWorkError(rest)
        return rest()


@dataclass(frozen=True, eq=False)
class _Images:
    """The images of a request that can be read.

    Attributes:
        values: Preprocessed, shape [M, 3, S, S].
        rows: Their numbers in the request, shape [M].
        count: Number of images in the request.
        trouble: Why the first of the others cannot be read; "" if there is none.
        canonical: The request as it is forwarded; None if that is as it was sent.
    """

    values: Floats
    rows: NDArray[np.int64]
    count: int
    trouble: str
    canonical: bytes | None = None


class Checker:
    """Screens the requests of one model with one profile.

    Args:
        profile: A calibrated profile.
        detector: The detector of the profile.
        model: The exported classifier; None if the embeddings come from the upstream server.
        settings: Settings of the model.
        metrics: Metrics of the model.
        shared: What all models of a sidecar share.
        sample: The sample of the model's traffic, if one is kept.

    Attributes:
        profile: As given.
        model: As given.
        metrics: As given.
        watch: What is done with the decisions besides answering.
        vetted: Whether requests may pass: the verdict on the model is good enough for the operator.
    """

    def __init__(
        self,
        profile: Profile,
        detector: Detector,
        model: ExportedClassifier | None,
        settings: ModelSettings,
        metrics: ModelMetrics,
        shared: Shared,
        sample: Reservoir | None,
    ) -> None:
        self.profile, self.model, self.metrics = profile, model, metrics
        self.watch = Watch(profile, detector, model, settings, metrics, shared, sample)
        self._settings, self._limits, self._workers = settings, shared.settings, shared.workers
        self.vetted = settings.clears(profile.document.vetting.verdict.outcome)
        metrics.describe(profile, detector)

    @property
    def _detector(self) -> Detector:
        """The detector that decides now; an axis of the traffic joins its scores while it is used."""
        return self.watch.detector

    @property
    def alpha(self) -> float:
        """p-value up to which an image is flagged."""
        return self._detector.alpha

    def find_images(self, request: ModelInferRequest) -> int:
        """The number of the input with the images; see `find_input`.

        Raises:
            RequestError: The input is missing, or the request can be read in different ways.
        """
        settings = self._settings
        return find_input(
            request, settings.input_tensor, others=settings.other_inputs, parameters=settings.pass_parameters
        )

    async def infer(self, message: ModelInferRequest, trace_id: str) -> Inference:
        """Classify and screen the images of a request in one pass (embedded mode).

        Args:
            message: The request.
            trace_id: The trace that the request belongs to, or "".

        Raises:
            RequestError: The request cannot be served, whatever the failure policy.
            OverloadedError: Every worker is busy and the queue is full.
        """
        return await self._workers.run(lambda: self._infer(message, trace_id))

    async def check_request(
        self, message: ModelInferRequest, trace_id: str, forward: Callable[[bytes], None] | None = None
    ) -> Outcome:
        """Embed and screen the images of a request that goes to an upstream server.

        Args:
            message: The request.
            trace_id: The trace that the request belongs to, or "".
            forward: Called from another thread with the serialised request that holds the pixels that are checked, as
                soon as these are known; not called if nothing of the request can be checked. None if the request is
                forwarded as it was sent: then images that programs read in different ways are not checked.
        """
        return await self._bounded(lambda: self._check(message, trace_id, forward))

    async def check_embeddings(self, embeddings: Floats, message: ModelInferRequest, trace_id: str) -> Outcome:
        """Screen embeddings, shape [N, D], that the upstream server computed for a request."""
        rows = np.arange(len(embeddings))
        return await self._bounded(
            lambda: self._score(embeddings, message, trace_id, _Images(embeddings, rows, len(rows), ""), seen=False)
        )

    async def _bounded(self, work: Callable[[], Outcome]) -> Outcome:
        """Run a check within the time limit; whatever fails becomes `unchecked` with a reason, never `pass`."""
        if not self._limits.screening:
            return Outcome.unchecked(Reason.DISABLED)
        try:
            async with asyncio.timeout(self._limits.timeout):
                return await self._workers.run(work)
        except TimeoutError:
            return Outcome.unchecked(Reason.TIMEOUT)
        except OverloadedError:
            return Outcome.unchecked(Reason.OVERLOADED)
        except RequestError as error:
            return Outcome.unchecked(Reason.INPUT_UNREADABLE, str(error))
        except Exception:
            log.exception("screening failed")
            return Outcome.unchecked(Reason.ERROR)

    def _check(self, message: ModelInferRequest, trace_id: str, forward: Callable[[bytes], None] | None) -> Outcome:
        with self.metrics.stage("decode"):
            claims = self._claims(message)

        def rest() -> Outcome:
            with self.metrics.stage("decode"):
                images = self._decoded(message, claims, replaced=forward is not None, ambiguous=forward is not None)
            if not len(images.rows):
                raise RequestError(images.trouble)
            if forward is not None and images.canonical is not None:
                forward(images.canonical)
            checkpoint()
            with self.metrics.stage("inference"):
                embeddings, _ = self._own_model.run(images.values)
            return self._score(embeddings, message, trace_id, images)

        return claims.in_turn(rest)

    def _infer(self, message: ModelInferRequest, trace_id: str) -> Inference:
        with self.metrics.stage("decode"):
            claims = self._claims(message)
        if claims.troubles:
            raise RequestError(claims.trouble)
        return claims.in_turn(lambda: self._classify(message, claims, trace_id))

    def _classify(self, message: ModelInferRequest, claims: _Claims, trace_id: str) -> Inference:
        with self.metrics.stage("decode"):
            images = self._decoded(message, claims, replaced=False, ambiguous=True)
        if images.trouble:
            # Every image needs an answer.
            raise RequestError(images.trouble)
        checkpoint()
        with self.metrics.stage("inference"):
            embeddings, logits = self._own_model.run(images.values)
        if not self._limits.screening:
            return Inference(logits, Outcome.unchecked(Reason.DISABLED))
        try:
            return Inference(logits, self._score(embeddings, message, trace_id, images))
        except Exception:
            log.exception("screening failed")
            return Inference(logits, Outcome.unchecked(Reason.ERROR))

    @property
    def _own_model(self) -> ExportedClassifier:
        if self.model is None:
            raise RuntimeError("this sidecar has no model of its own")
        return self.model

    def _claims(self, request: ModelInferRequest) -> _Claims:
        """What a request claims to hold, before any image is decoded.

        Raises:
            RequestError: The request cannot be read in one way, or its images are beyond the limits in sum.
        """
        index, limits = self.find_images(request), self._limits
        tensor, raw = request.inputs[index], raw_contents(request, index)
        where = f"input {tensor.name[:128]!r}: "
        if tensor.datatype != "BYTES":
            return _Claims(index, where, None, 0, {})
        files = encoded_images(tensor, raw, limits.max_batch)
        try:
            work, troubles = read_headers(files, max_pixels=limits.max_pixels, max_work=limits.max_request_pixels)
        except ImageError as error:
            raise RequestError(f"{where}{error}") from error
        return _Claims(index, where, files, work, troubles)

    def _decoded(self, request: ModelInferRequest, claims: _Claims, *, replaced: bool, ambiguous: bool) -> _Images:
        """Read the images of a request, each by itself.

        Args:
            request: The request.
            claims: What it claims to hold.
            replaced: Whether encoded images are forwarded as the pixels that are read here.
            ambiguous: Whether images may be read that other programs read differently.
        """
        preprocessing, limits, files = self._own_model.preprocessing, self._limits, claims.files
        size = preprocessing.size
        if files is None:
            tensor, raw = request.inputs[claims.index], raw_contents(request, claims.index)
            values = float_images(tensor, raw, (3, size, size), limits.max_batch)
            if np.isfinite(values).all():
                return _Images(values, np.arange(len(values)), len(values), "")
            finite, trouble = np.isfinite(values).all(axis=(1, 2, 3)), "a value is not finite (NaN or infinity)"
            trouble = f"{claims.where}{trouble}"
            return _Images(values[finite], np.flatnonzero(finite), len(values), trouble)
        pixels: dict[int, NDArray[np.uint8]] = {}
        for row, file in enumerate(files):
            if row in claims.troubles:
                continue
            checkpoint()
            try:
                image = (
                    decode(file, max_pixels=limits.max_pixels)
                    if ambiguous
                    else decode_unambiguous(file, size=size, max_pixels=limits.max_pixels)
                )
                pixels[row] = preprocessing.pixels(image, max_pixels=limits.max_pixels)
            except ImageError as error:
                claims.troubles[row] = error
        read = np.array([*pixels.values()], np.uint8).reshape(-1, 3, size, size)
        canonical = None
        if replaced:
            # What cannot be read is forwarded as it is; the failure policy decides about it.
            sent = [encode(pixels[row]) if row in pixels else file for row, file in enumerate(files)]
            canonical = with_images(request, claims.index, sent)
        return _Images(preprocessing.normalise(read), np.array([*pixels], int), len(files), claims.trouble, canonical)

    def _score(
        self, embeddings: Floats, message: ModelInferRequest, trace_id: str, images: _Images, *, seen: bool = True
    ) -> Outcome:
        """Screen the embeddings of images, shape [M, D], each by itself: one that cannot be scored frees no other.

        Args:
            embeddings: One for each of the images.
            message: The request.
            trace_id: The trace that the request belongs to, or "".
            images: The images.
            seen: Whether guard has seen the images, and not only their embeddings.
        """
        scorable = self._detector.screen.scorable(embeddings)
        trouble = images.trouble or ("" if scorable.all() else "an embedding is zero or not finite")
        if not scorable.any():
            return Outcome.unchecked(Reason.INPUT_UNREADABLE, trouble)
        rows, values = images.rows, images.values
        if not scorable.all():
            rows, values, embeddings = rows[scorable], values[scorable], embeddings[scorable]
        with self.metrics.stage("screening"):
            found = self._detector.score(embeddings)
        names = self._detector.triggers  # axes are only ever added behind the others
        kept = self.watch.follow(found, rows, message, trace_id, values if seen else None)
        unread = np.ones(images.count, bool)
        unread[rows] = False

        def of_all(values: NDArray[Any], missing: float) -> NDArray[Any]:
            every = np.full(images.count, missing, values.dtype)
            every[rows] = values
            return every

        flags = of_all(kept, 0)
        reason = None if self.vetted else Reason.MODEL_NOT_VETTED
        if unread.any() and reason is None:
            reason = Reason.INPUT_UNREADABLE
        return Outcome(
            Decision.FLAG if flags.any() else Decision.PASS if reason is None else Decision.UNCHECKED,
            reason,
            trouble if reason is Reason.INPUT_UNREADABLE else "",
            scores=of_all(found.scores.values, np.nan),
            flags=flags,
            p_values=of_all(found.p_values, np.nan),
            alpha=self._detector.alpha,
            triggers=tuple("" if index < 0 else names[index] for index in of_all(found.scores.triggers, -1)),
            withdrawn=int((found.flags & ~kept).sum()),
            classes=of_all(found.scores.classes, -1),
            unread=unread if unread.any() else None,
        )
