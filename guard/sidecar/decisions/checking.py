"""Decode, embed and screen the images of a request."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from guard._types import Floats
from guard.classifiers import ExportedClassifier, Preprocessing, decode
from guard.classifiers.headers import check_files
from guard.errors import ImageError, RequestError
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.tensors import encoded_images, find_input, float_images
from guard.screening import Detector
from guard.sidecar.decisions.reservoir import Reservoir
from guard.sidecar.decisions.watch import Shared, Watch
from guard.sidecar.decisions.workers import LargeWorkError, OverloadedError, checkpoint
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Decision, Outcome, Reason
from guard.sidecar.telemetry.metrics import ModelMetrics

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
        self._detector = detector
        self.watch = Watch(profile, detector, model, settings, metrics, shared, sample)
        self._input, self._limits, self._workers = settings.input_tensor, shared.settings, shared.workers
        self.vetted = settings.clears(profile.document.vetting.verdict.outcome)
        metrics.describe(profile, detector)

    @property
    def alpha(self) -> float:
        """p-value up to which an image is flagged."""
        return self._detector.alpha

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

    async def check_request(self, message: ModelInferRequest, trace_id: str) -> Outcome:
        """Embed and screen the images of a request that goes to an upstream server."""
        return await self._bounded(lambda: self._infer(message, trace_id).outcome)

    async def check_embeddings(self, embeddings: Floats, message: ModelInferRequest, trace_id: str) -> Outcome:
        """Screen embeddings, shape [N, D], that the upstream server computed for a request."""
        return await self._bounded(lambda: self._score(embeddings, message, trace_id, None))

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

    def _infer(self, message: ModelInferRequest, trace_id: str) -> Inference:
        if self.model is None:
            raise RuntimeError("this sidecar has no model of its own")
        model = self.model
        with self.metrics.stage("decode"):
            images = self._images(message, model)
        if not callable(images):
            return self._classify(images, model, message, trace_id)
        decode_later = images

        def rest() -> Inference:
            with self.metrics.stage("decode"):
                decoded = decode_later()
            return self._classify(decoded, model, message, trace_id)

        raise LargeWorkError(rest)

    def _classify(
        self, images: Floats, model: ExportedClassifier, message: ModelInferRequest, trace_id: str
    ) -> Inference:
        checkpoint()
        with self.metrics.stage("inference"):
            embeddings, logits = model.run(images)
        if not self._limits.screening:
            return Inference(logits, Outcome.unchecked(Reason.DISABLED))
        try:
            return Inference(logits, self._score(embeddings, message, trace_id, images))
        except RequestError as error:
            # Caused by the client, with values so large that the model overflows.
            return Inference(logits, Outcome.unchecked(Reason.INPUT_UNREADABLE, str(error)))
        except Exception:
            log.exception("screening failed")
            return Inference(logits, Outcome.unchecked(Reason.ERROR))

    def _images(self, request: ModelInferRequest, model: ExportedClassifier) -> Floats | Callable[[], Floats]:
        """The preprocessed images of a request; if it takes long to decode them, a function that does so."""
        tensor, raw = find_input(request, self._input)
        preprocessing, limit = model.preprocessing, self._limits.max_batch
        if tensor.datatype != "BYTES":
            return float_images(tensor, raw, (3, preprocessing.size, preprocessing.size), limit)
        files = encoded_images(tensor, raw, limit)

        def decode_all() -> Floats:
            with _of_input(tensor.name):
                return np.stack([self._decode(file, preprocessing) for file in files])

        with _of_input(tensor.name):
            limits = self._limits
            work = check_files(files, max_pixels=limits.max_pixels, max_work=limits.max_request_pixels)
        return decode_all if work > LARGE_PIXELS else decode_all()

    def _decode(self, file: bytes, preprocessing: Preprocessing) -> Floats:
        checkpoint()
        limit = self._limits.max_pixels
        return preprocessing(decode(file, max_pixels=limit), max_pixels=limit)

    def _score(self, embeddings: Floats, message: ModelInferRequest, trace_id: str, images: Floats | None) -> Outcome:
        with self.metrics.stage("screening"):
            found = self._detector.score(embeddings)
        names = self._detector.screen.triggers
        flags = self.watch.follow(found, message, trace_id, images)
        return Outcome(
            Decision.FLAG if flags.any() else Decision.PASS if self.vetted else Decision.UNCHECKED,
            None if self.vetted else Reason.MODEL_NOT_VETTED,
            scores=found.scores.values,
            flags=flags,
            p_values=found.p_values,
            alpha=self._detector.alpha,
            triggers=tuple("" if index < 0 else names[index] for index in found.scores.triggers),
            withdrawn=int((found.flags & ~flags).sum()),
            classes=found.scores.classes,
        )


@contextmanager
def _of_input(name: str) -> Iterator[None]:
    """Errors of images become errors of the input that carries them."""
    try:
        yield
    except ImageError as error:
        raise RequestError(f"input {name!r}: {error}") from error
