"""Decode, embed and screen the images of a request: the work of a sidecar that is not talking."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from threading import Semaphore
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from guard.classifiers import ExportedClassifier, Preprocessing, decode
from guard.errors import ImageError, RequestError
from guard.profiles import Profile
from guard.sidecar.inference_pb2 import ModelInferRequest
from guard.sidecar.metrics import Metrics
from guard.sidecar.policy import Decision, Outcome, Reason
from guard.sidecar.settings import Settings
from guard.sidecar.tensors import encoded_images, find_input, float_images
from guard.sidecar.watch import Request, Watch

log = logging.getLogger(__name__)

T = TypeVar("T")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Inference:
    """One pass through the exported classifier, and what guard makes of it.

    Attributes:
        logits: Class scores, shape [N, C].
        outcome: The decision.
    """

    logits: Floats
    outcome: Outcome


class OverloadedError(Exception):
    """Every worker is busy, and as many requests wait as may."""


class Checker:
    """Screens requests with one profile, on a bounded pool of threads with a bounded queue.

    numpy, Pillow and ONNX Runtime release the interpreter while they work, so that the event loop keeps serving.

    Args:
        profile: Calibrated.
        model: The exported classifier; None where the embeddings come from the upstream server.
        settings: Of the sidecar.
        metrics: Measured into.
    """

    def __init__(
        self, profile: Profile, model: ExportedClassifier | None, settings: Settings, metrics: Metrics
    ) -> None:
        self._detector = profile.detector(settings.neighbours)
        self.watch = Watch(profile, self._detector, model, settings, metrics)
        self._model, self._settings, self._metrics = model, settings, metrics
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="guard")
        self._room = Semaphore(settings.workers + settings.queue)

    def close(self) -> None:
        """Let running work end and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.watch.close()

    async def infer(self, request: Request) -> Inference:
        """Classify and screen in one pass (embedded mode).

        Raises:
            RequestError: The request cannot be served, whatever the failure policy.
            OverloadedError: There is no worker for it.
        """
        return await self._run(lambda: self._infer(request))

    async def check_request(self, request: Request) -> Outcome:
        """Embed and screen the input of a request that goes to an upstream server."""
        return await self._bounded(lambda: self._infer(request).outcome)

    async def check_embeddings(self, embeddings: Floats, request: Request) -> Outcome:
        """Screen embeddings that the upstream server computed."""
        return await self._bounded(lambda: self._score(embeddings, request, None))

    async def _run(self, work: Callable[[], T]) -> T:
        """Run on the pool.

        What nobody waits for any more is skipped when its turn comes, and has its place in the queue until then.
        """
        if not self._room.acquire(blocking=False):
            raise OverloadedError
        wanted = True

        def run() -> T:
            try:
                if not wanted:
                    raise TimeoutError
                return work()
            finally:
                self._room.release()

        try:
            # The context tells the log which request this is.
            running = asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, run)
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            wanted = False
            raise

    async def _bounded(self, work: Callable[[], Outcome]) -> Outcome:
        """Run within the time limit; whatever goes wrong becomes `unchecked` with its reason, never `pass`."""
        if not self._settings.screening:
            return Outcome.unchecked(Reason.DISABLED)
        try:
            return await asyncio.wait_for(self._run(work), self._settings.timeout)
        except TimeoutError:
            return Outcome.unchecked(Reason.TIMEOUT)
        except OverloadedError:
            return Outcome.unchecked(Reason.OVERLOADED)
        except RequestError as error:
            return Outcome.unchecked(Reason.INPUT_UNREADABLE, str(error))
        except Exception:
            log.exception("screening failed")
            return Outcome.unchecked(Reason.ERROR)

    def _infer(self, request: Request) -> Inference:
        if self._model is None:
            raise RuntimeError("this sidecar has no model of its own")
        with self._metrics.stage("decode"):
            images = self._images(request.message, self._model)
        with self._metrics.stage("inference"):
            embeddings, logits = self._model.run(images)
        if not self._settings.screening:
            return Inference(logits, Outcome.unchecked(Reason.DISABLED))
        try:
            return Inference(logits, self._score(embeddings, request, images))
        except RequestError as error:
            # The client's doing, by values so large that the model overflows.
            return Inference(logits, Outcome.unchecked(Reason.INPUT_UNREADABLE, str(error)))
        except Exception:
            log.exception("screening failed")
            return Inference(logits, Outcome.unchecked(Reason.ERROR))

    def _images(self, request: ModelInferRequest, model: ExportedClassifier) -> Floats:
        tensor, raw = find_input(request, self._settings.input)
        preprocessing, limit = model.preprocessing, self._settings.max_batch
        if tensor.datatype != "BYTES":
            return float_images(tensor, raw, (3, preprocessing.size, preprocessing.size), limit)
        try:
            return np.stack([self._decode(file, preprocessing) for file in encoded_images(tensor, raw, limit)])
        except ImageError as error:
            raise RequestError(f"input {tensor.name!r}: {error}") from error

    def _decode(self, file: bytes, preprocessing: Preprocessing) -> Floats:
        limit = self._settings.max_pixels
        return preprocessing(decode(file, max_pixels=limit), max_pixels=limit)

    def _score(self, embeddings: Floats, request: Request, images: Floats | None) -> Outcome:
        with self._metrics.stage("screening"):
            found = self._detector.judge(embeddings)
        names = self._detector.screen.triggers
        flags = self.watch.follow(found, request, images)
        return Outcome(
            Decision.FLAG if flags.any() else Decision.PASS,
            scores=found.scores.values,
            flags=flags,
            p_values=found.p_values,
            alpha=self._detector.alpha,
            triggers=tuple("" if index < 0 else names[index] for index in found.scores.triggers),
            withdrawn=int((found.flags & ~flags).sum()),
            classes=found.scores.classes,
        )
