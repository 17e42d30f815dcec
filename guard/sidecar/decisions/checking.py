"""Embed and screen the images of a request, and ask the reference model about them."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers import ExportedClassifier
from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import parse_request
from guard.screening import DIVERGENCE, OPINIONS, RESIDUAL, Detector, Judgement, ReferenceAnswers, Scores
from guard.sidecar.decisions.certification import Certification
from guard.sidecar.decisions.inputs import Claims, Inputs
from guard.sidecar.decisions.loading import Loaded, make_reader
from guard.sidecar.decisions.opinions import Answered
from guard.sidecar.decisions.reservoir import Reservoir
from guard.sidecar.decisions.texts import TextReader
from guard.sidecar.decisions.watch import Shared, Watch
from guard.sidecar.decisions.workers import OverloadedError, checkpoint
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Decision, Outcome, Reason
from guard.sidecar.telemetry.metrics import ModelMetrics

T = TypeVar("T")
Forward = Callable[[bytes], None]
"""Takes the serialised request that holds the pixels that are checked."""
Ask = Callable[[NDArray[np.int64]], Answered]
"""Asks the reference model about images, by their numbers in the request."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Inference:
    """The result of one forward pass through the exported classifier.

    Attributes:
        embeddings: L2-normalised, shape [N, D].
        logits: Class scores, shape [N, C].
        outcome: The decision about the images.
    """

    embeddings: Floats
    logits: Floats
    outcome: Outcome


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is known of a request before the upstream server's embeddings of its images are.

    Attributes:
        checker: The checker that prepared it.
        drawn: Whether the request is to get a second opinion.
        answered: What the reference model answered; None if it is asked when the embeddings are known, or failed.
        source: The request in the form that is forwarded, from which images are read when the embeddings are known;
            None if they need not be.
        failed: Why there is no second opinion, as an outcome; None if nothing failed.
    """

    checker: "Checker"
    drawn: bool = False
    answered: Answered | None = None
    source: bytes | ModelInferRequest | None = None
    failed: Outcome | None = None


@dataclass(frozen=True, eq=False)
class _Subject:
    """A request whose images are judged.

    Attributes:
        message: The request.
        trace_id: The trace that it belongs to, or "".
        images: Its images; without values if guard sees only their embeddings.
        seen: Whether guard sees the images.
        unusable: The reason for images without a usable embedding.
    """

    message: ModelInferRequest
    trace_id: str
    images: Inputs
    seen: bool = True
    unusable: Reason = Reason.INPUT_UNREADABLE


@dataclass(frozen=True, eq=False)
class _Scored:
    """The images of a request that could be scored.

    Attributes:
        subject: The request.
        scores: Their scores, N of them.
        rows: Their numbers in the request, shape [N].
        wanted: Which of them are to get a second opinion, shape [N].
        given: Which of them got one, shape [N].
        trouble: Why the first of the other images, or of those without a wanted second opinion, was not judged.
    """

    subject: _Subject
    scores: Scores
    rows: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    given: NDArray[np.bool_]
    trouble: str


class _Progress:
    """How far a check has come: what is known before the reference model is asked outlives a failure of that.

    Attributes:
        scored: What is known; None until the reference model is asked.
        found: Embeddings and class scores, in embedded mode.
        seconds: How long the model's own forward pass took, in embedded mode.
        reached: Done as soon as the reference model is asked.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.scored: _Scored | None = None
        self.found: tuple[Floats, Floats] | None = None
        self.seconds = 0.0
        self.reached: asyncio.Future[None] = self._loop.create_future()
        self._recorded = threading.Lock()

    def reach(self, scored: _Scored) -> None:
        """Make known what the scores are; called on a thread of the workers."""
        self.scored = scored
        self._loop.call_soon_threadsafe(self._reach)

    def _reach(self) -> None:
        if not self.reached.done():
            self.reached.set_result(None)

    def claim(self) -> bool:
        """Whether the caller is the first to conclude the check, and so the one who records it."""
        return self._recorded.acquire(blocking=False)


class Checker:
    """Screens the requests of one model with one profile.

    Args:
        loaded: What the model is screened with.
        settings: Settings of the model.
        metrics: Metrics of the model.
        shared: What all models of a sidecar share.
        sample: The sample of the model's traffic, if one is kept.

    Attributes:
        profile: The profile.
        model: The exported classifier; None if the embeddings come from the upstream server.
        opinions: Asks the reference model; None without second opinions.
        metrics: As given.
        watch: What is done with the decisions besides answering.
        certification: The decision about the model's certificate; None if the settings name no policy.
    """

    def __init__(
        self, loaded: Loaded, settings: ModelSettings, metrics: ModelMetrics, shared: Shared, sample: Reservoir | None
    ) -> None:
        self.profile, self.model, self.opinions, self.metrics = loaded.profile, loaded.model, loaded.opinions, metrics
        self._settings, self._limits, self._workers = settings, shared.settings, shared.workers
        self._reader = make_reader(loaded, settings, shared.settings)
        self.watch = Watch(
            loaded.profile, loaded.detector, loaded.model, settings, metrics, shared, sample,
            asks=loaded.opinions is not None,
            tokenizer=self._reader.tokenizer if isinstance(self._reader, TextReader) else None,
        )  # fmt: skip
        self._vetted = settings.clears(loaded.profile.document.vetting.verdict.outcome)
        rule = "off" if loaded.opinions is None else loaded.opinions.rule
        self.certify(loaded.certification)
        metrics.describe(loaded.profile, loaded.detector.alpha, self.watch.threshold, rule)

    def certify(self, certification: Certification | None) -> None:
        """Take another decision about the certificate, of the same model and profile."""
        self.certification = certification
        if certification is not None:
            self.metrics.certified(certification.admission)

    def recertify(self) -> None:
        """Decide again about the certificate."""
        if self.certification is not None:
            self.certification.renew()
            self.metrics.certified(self.certification.admission)

    @property
    def barred(self) -> Reason | None:
        """Why no request may pass to this model, whatever it carries; None if requests may."""
        certification = self.certification
        if self._limits.require_certified and (certification is None or not certification.admission.admitted):
            return Reason.MODEL_NOT_CERTIFIED
        return None if self._vetted else Reason.MODEL_NOT_VETTED

    @property
    def _detector(self) -> Detector:
        """The detector that decides now; an axis of the traffic joins its scores while it is used."""
        return self.watch.detector

    @property
    def alpha(self) -> float:
        """p-value up to which an image is flagged."""
        return self._detector.alpha

    def find_input(self, request: ModelInferRequest) -> int:
        """The number of the input with the images or texts; see `guard.protocol.tensors.find_input`.

        Raises:
            RequestError: The input is missing, or the request can be read in different ways.
        """
        return self._reader.find_input(request)

    async def infer(self, message: ModelInferRequest, trace_id: str) -> Inference:
        """Classify and screen the images of a request (embedded mode).

        One forward pass gives the answer and the embedding. A second opinion takes another, which has a time limit:
        without it there is an answer, and the failure policy decides about that. Beyond the limit of the settings, the
        second pass may take as long as the first did, so that the limit does not depend on the number of images.

        Args:
            message: The request.
            trace_id: The trace that the request belongs to, or "".

        Raises:
            RequestError: The request cannot be served, whatever the failure policy.
            OverloadedError: Every worker is busy and the queue is full.
        """
        progress = _Progress()
        work = self._workers.run(lambda: self._infer(message, trace_id, progress))
        if self.opinions is None:
            return await work
        running = asyncio.ensure_future(work)
        try:
            waiting: set[asyncio.Future[Any]] = {running, progress.reached}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            try:
                async with asyncio.timeout(self._limits.timeout + progress.seconds):
                    return await running
            except TimeoutError:
                outcome = self._without_opinion(progress, Outcome.unchecked(Reason.TIMEOUT))
        finally:
            running.cancel()
        if progress.found is None:
            raise AssertionError("the model answers before the reference model is asked")
        return Inference(*progress.found, outcome)

    async def check_request(self, message: ModelInferRequest, trace_id: str, forward: Forward | None = None) -> Outcome:
        """Embed and screen the images of a request that goes to an upstream server.

        Args:
            message: The request.
            trace_id: The trace that the request belongs to, or "".
            forward: Called from another thread with the serialised request that holds the pixels that are checked, as
                soon as these are known; not called if nothing of the request can be checked. None if the request is
                forwarded as it was sent: then images that programs read in different ways are not checked.
        """
        if not self._limits.screening:
            return Outcome.unchecked(Reason.DISABLED)
        progress = _Progress()
        try:
            return await self._bounded(lambda: self._check(message, trace_id, forward, progress))
        except _UncheckedError as error:
            return self._without_opinion(progress, error.outcome)

    def prepared_bytes(self, images: int, message: int) -> int:
        """Bytes that what is prepared for a request takes, besides the request, until the embeddings are known.

        Args:
            images: Number of images that the request claims to carry.
            message: Size of the request as it is forwarded; 0 if it is kept anyway.
        """
        if self.opinions is None:
            return 0
        return message if self.opinions.near_only else min(images, self._limits.max_batch) * self.opinions.answer_bytes

    def draw(self) -> bool:
        """Whether a request whose embeddings come from the upstream server is to get a second opinion."""
        return self._limits.screening and self.model is None and self.opinions is not None and self.opinions.drawn()

    async def prepare(self, message: ModelInferRequest, forward: Forward | None = None) -> Prepared:
        """Read the images of a request whose embeddings come from the upstream server, and ask about them.

        If only images are asked about that other scores put near the threshold, these are read when the embeddings
        are known; what is forwarded has to be known before.

        Args:
            message: The request.
            forward: As for `check_request`.
        """
        if self.opinions is None:
            return Prepared(self)
        if forward is None and self.opinions.near_only:
            return Prepared(self, drawn=True, source=message)
        try:
            return await self._bounded(lambda: self._prepare(message, forward))
        except _UncheckedError as error:
            return self.unprepared(error.outcome)

    def unprepared(self, failed: Outcome) -> Prepared:
        """What is known of a request that is to get a second opinion and cannot; `failed` says why."""
        return Prepared(self, drawn=True, failed=failed)

    async def check_embeddings(
        self, embeddings: Floats, message: ModelInferRequest, trace_id: str, prepared: Prepared | None = None
    ) -> Outcome:
        """Screen embeddings, shape [N, D], that the upstream server computed for a request.

        Args:
            embeddings: One for each image of the request.
            message: The request.
            trace_id: The trace that the request belongs to, or "".
            prepared: What this checker prepared for the request; None for no second opinion.
        """
        if not self._limits.screening:
            return Outcome.unchecked(Reason.DISABLED)
        rows, progress = np.arange(len(embeddings)), _Progress()
        images = Inputs(embeddings, rows, len(rows), "")
        subject = _Subject(message, trace_id, images, seen=False, unusable=Reason.EMBEDDING_MISSING)
        try:
            return await self._bounded(lambda: self._join(embeddings, subject, prepared or Prepared(self), progress))
        except _UncheckedError as error:
            failed = error.outcome
            if failed.reason is Reason.INPUT_UNREADABLE:
                failed = replace(failed, reason=Reason.EMBEDDING_MISSING)
            return self._without_opinion(progress, failed)

    async def _bounded(self, work: Callable[[], T]) -> T:
        """Run a part of a check within the time limit.

        Raises:
            _UncheckedError: It failed, for whatever reason: the request is `unchecked`, never `pass`.
        """
        try:
            async with asyncio.timeout(self._limits.timeout):
                return await self._workers.run(work)
        except TimeoutError:
            outcome = Outcome.unchecked(Reason.TIMEOUT)
        except OverloadedError:
            outcome = Outcome.unchecked(Reason.OVERLOADED)
        except RequestError as error:
            outcome = Outcome.unchecked(Reason.INPUT_UNREADABLE, str(error))
        except Exception:
            log.exception("screening failed")
            outcome = Outcome.unchecked(Reason.ERROR)
        raise _UncheckedError(outcome)

    def _check(
        self, message: ModelInferRequest, trace_id: str, forward: Forward | None, progress: _Progress
    ) -> Outcome:
        with self.metrics.stage("decode"):
            claims = self._reader.claims(message)

        def rest() -> Outcome:
            images = self._read(message, claims, forward)
            checkpoint()
            with self.metrics.stage("inference"):
                embeddings, _ = self._own_model.run(images.values)
            return self._score(embeddings, _Subject(message, trace_id, images), progress, self._ask_if_drawn(images))

        return claims.in_turn(rest)

    def _prepare(self, message: ModelInferRequest, forward: Forward | None) -> Prepared:
        with self.metrics.stage("decode"):
            claims = self._reader.claims(message)

        def rest() -> Prepared:
            images = self._read(message, claims, forward)
            if self.opinions is None or self.opinions.near_only:
                return Prepared(self, drawn=True, source=images.canonical or message)
            checkpoint()
            answered = self._ask(images, images.rows)
            return Prepared(self, drawn=True, answered=replace(answered, trouble=images.trouble or answered.trouble))

        return claims.in_turn(rest)

    def _read(self, message: ModelInferRequest, claims: Claims, forward: Forward | None) -> Inputs:
        """Read the images of a request, and hand over what is forwarded of it.

        Raises:
            RequestError: None of the images can be read.
        """
        with self.metrics.stage("decode"):
            images = self._reader.read(message, claims, replaced=forward is not None, ambiguous=forward is not None)
        if not len(images.rows):
            raise RequestError(images.trouble)
        if forward is not None and images.canonical is not None:
            forward(images.canonical)
        return images

    def _join(self, embeddings: Floats, subject: _Subject, prepared: Prepared, progress: _Progress) -> Outcome:
        """Screen the upstream server's embeddings, with the second opinion that was prepared."""
        if not prepared.drawn:
            return self._score(embeddings, subject, progress, None)
        if (failed := prepared.failed) is not None:
            return self._score(embeddings, subject, progress, _failing(failed), failed)
        if (answered := prepared.answered) is not None:
            return self._score(embeddings, subject, progress, lambda _: answered)
        # As it was forwarded: replaced images have one reading, and others must have one.
        canonical, source = isinstance(prepared.source, bytes), prepared.source
        message = parse_request(source) if isinstance(source, bytes) else source or subject.message
        try:
            claims = self._reader.claims(message)
        except RequestError as error:
            failed = Outcome.unchecked(Reason.INPUT_UNREADABLE, str(error))
            return self._score(embeddings, subject, progress, _failing(failed), failed)

        def ask(rows: NDArray[np.int64]) -> Answered:
            with self.metrics.stage("decode"):
                images = self._reader.read(
                    message, claims, replaced=False, ambiguous=canonical, only=frozenset(rows.tolist())
                )
            read = np.intersect1d(images.rows, rows)
            return replace(self._ask(images, read), trouble=images.trouble) if len(read) else _none(images.trouble)

        return claims.in_turn(lambda: self._score(embeddings, subject, progress, ask))

    def _infer(self, message: ModelInferRequest, trace_id: str, progress: _Progress) -> Inference:
        with self.metrics.stage("decode"):
            claims = self._reader.claims(message)
        if claims.troubles:
            raise RequestError(claims.trouble)
        return claims.in_turn(lambda: self._classify(message, claims, trace_id, progress))

    def _classify(self, message: ModelInferRequest, claims: Claims, trace_id: str, progress: _Progress) -> Inference:
        with self.metrics.stage("decode"):
            images = self._reader.read(message, claims, replaced=False, ambiguous=True)
        if images.trouble:
            # Every image needs an answer.
            raise RequestError(images.trouble)
        checkpoint()
        started = perf_counter()
        with self.metrics.stage("inference"):
            progress.found = found = self._own_model.run(images.values)
        progress.seconds = perf_counter() - started
        if not self._limits.screening:
            return Inference(*found, Outcome.unchecked(Reason.DISABLED))
        try:
            subject = _Subject(message, trace_id, images)
            return Inference(*found, self._score(found[0], subject, progress, self._ask_if_drawn(images)))
        except TimeoutError:
            raise  # nobody waits any more
        except Exception:
            log.exception("screening failed")
            return Inference(*found, Outcome.unchecked(Reason.ERROR))

    @property
    def _own_model(self) -> ExportedClassifier:
        if self.model is None:
            raise RuntimeError("this sidecar has no model of its own")
        return self.model

    def _ask_if_drawn(self, images: Inputs) -> Ask | None:
        """What asks the reference model about images of a request; None if the request gets no second opinion."""
        if self.opinions is None:
            return None
        return partial(self._ask, images) if self.opinions.drawn() else None

    def _ask(self, images: Inputs, rows: NDArray[np.int64]) -> Answered:
        if self.opinions is None:
            raise RuntimeError("this model has no reference model")
        with self.metrics.stage("second opinion"):
            return self.opinions.ask(images.of(rows), rows)

    def _score(
        self,
        embeddings: Floats,
        subject: _Subject,
        progress: _Progress,
        ask: Ask | None,
        failed: Outcome | None = None,
    ) -> Outcome:
        """Screen the embeddings of images, each by itself: one that cannot be scored frees no other.

        Args:
            embeddings: One for each of the images that can be read, shape [M, D].
            subject: The request.
            progress: Where it is noted what is known before the reference model is asked.
            ask: Asks the reference model; None if the request gets no second opinion.
            failed: Why there is no second opinion on any image, if that is known.
        """
        scorable, images = self._detector.screen.scorable(embeddings), subject.images
        trouble = images.trouble or ("" if scorable.all() else "an embedding is zero or not finite")
        if not scorable.any():
            return Outcome.unchecked(subject.unusable, trouble)
        with self.metrics.stage("screening"):
            scores = self._detector.screen.score_samples(embeddings[scorable])
        nothing = np.zeros(len(scores.values), bool)
        scored = _Scored(subject, scores, images.rows[scorable], nothing, nothing, trouble)
        if self.opinions is None or ask is None:
            if self.opinions is not None:
                self.metrics.second_opinions("not_drawn", len(scores.values))
            return self._conclude(scored, progress)
        wanted = self.opinions.wanted(self._detector.screen, scores)
        self.metrics.second_opinions("not_near", int((~wanted).sum()))
        if not wanted.any():
            return self._conclude(scored, progress)
        scored = replace(scored, wanted=wanted)
        progress.reach(scored)
        return self._with_opinion(scored, progress, ask, failed)

    def _with_opinion(self, scored: _Scored, progress: _Progress, ask: Ask, failed: Outcome | None) -> Outcome:
        """Conclude a check with what the reference model answers."""
        checkpoint()
        try:
            answered = ask(scored.rows[scored.wanted])
            given = scored.wanted & np.isin(scored.rows, answered.rows)
            answers, scores = answered.answers[np.isin(answered.rows, scored.rows[given])], scored.scores
            if given.any():
                scores = self._detector.screen.with_opinion(scores, answers, np.flatnonzero(given))
        except TimeoutError:
            raise  # nobody waits any more
        except Exception:
            log.exception("the second opinion failed")
            return self._conclude(scored, progress, Outcome.unchecked(Reason.ERROR))
        checkpoint()
        scored = replace(scored, scores=scores, given=given, trouble=scored.trouble or answered.trouble)
        return self._conclude(scored, progress, failed)

    def _without_opinion(self, progress: _Progress, failed: Outcome) -> Outcome:
        """The outcome of a check that failed: what was known before still counts, so that a flag remains a flag.

        Args:
            progress: How far the check has come.
            failed: Why it failed, as an outcome.
        """
        if progress.scored is None:
            return failed
        return self._conclude(progress.scored, progress, failed, awaited=False)

    def _conclude(
        self, scored: _Scored, progress: _Progress, failed: Outcome | None = None, *, awaited: bool = True
    ) -> Outcome:
        """Decide, and hand the decision to whoever watches.

        Args:
            scored: The images that could be scored.
            progress: Who concludes first records.
            failed: Why wanted second opinions are missing, if the reason is one of the whole request.
            awaited: Whether the caller is the thread that checks; otherwise it is the event loop, on which there is no
                time for second looks.
        """
        found = self._detector.judge(scored.scores)
        kept = found.flags
        if progress.claim():
            self._count(scored)
            images, rows = scored.subject.images, scored.rows
            values = images.of(rows) if scored.subject.seen and awaited else None
            kept = self.watch.follow(found, rows, scored.subject.message, scored.subject.trace_id, values)
        return self._outcome(scored, found, kept, failed)

    def _count(self, scored: _Scored) -> None:
        """Count the second opinions, given and missing."""
        scores, given = scored.scores, scored.given
        agree = scores.answers[given] == scores.classes[given] if given.any() else given[given]
        self.metrics.second_opinions("agrees", int(agree.sum()))
        self.metrics.second_opinions("differs", int((~agree).sum()))
        self.metrics.second_opinions("failed", int((scored.wanted & ~given).sum()))

    def _outcome(self, scored: _Scored, found: Judgement, kept: NDArray[np.bool_], failed: Outcome | None) -> Outcome:
        """The outcome of a request.

        Args:
            scored: The images that could be scored.
            found: What was decided about them.
            kept: The flags, without those that a second look withdrew.
            failed: Why wanted second opinions are missing, if the reason is one of the whole request.
        """
        subject, scores, rows, count = scored.subject, found.scores, scored.rows, scored.subject.images.count
        missing = scored.wanted & ~scored.given & ~kept
        unread = np.ones(count, bool)
        unread[rows[~missing]] = False

        def of_all(values: NDArray[Any], missing: float) -> NDArray[Any]:
            every = np.full(count, missing, values.dtype)
            every[rows] = values
            return every

        def texts(values: Sequence[str]) -> tuple[str, ...]:
            every = dict(zip(rows.tolist(), values, strict=True))
            return tuple(every.get(row, "") for row in range(count))

        flags = of_all(kept, 0)
        reason, detail = self.barred, ""
        if reason is None and failed is not None:
            reason, detail = failed.reason, failed.detail
        elif reason is None and unread.any():
            reason = Reason.INPUT_UNREADABLE if missing.any() else subject.unusable
            detail = scored.trouble
        names = [self.profile.class_name(k) if k >= 0 else "" for k in scores.answers.tolist()] or [""] * len(rows)
        parts = {name: of_all(scores.parts[name], np.nan) for name in OPINIONS if name in scores.parts}
        return Outcome(
            Decision.FLAG if flags.any() else Decision.PASS if reason is None else Decision.UNCHECKED,
            reason,
            detail,
            scores=of_all(scores.values, np.nan),
            flags=flags,
            p_values=of_all(found.p_values, np.nan),
            alpha=self._detector.alpha,
            decided_by=texts(scores.decided_by),
            triggers=texts(self._detector.named(scores)),
            answers=texts(names),
            divergences=parts.get(DIVERGENCE),
            residuals=parts.get(RESIDUAL),
            withdrawn=int((found.flags & ~kept).sum()),
            classes=of_all(scores.classes, -1),
            unread=unread if unread.any() else None,
        )


class _UncheckedError(Exception):
    """A part of a check failed; `outcome` says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome.reason))
        self.outcome = outcome


def _none(trouble: str) -> Answered:
    """No answer to any image, for a reason."""
    nothing = np.empty((0, 0), np.float32)
    return Answered(ReferenceAnswers(nothing, nothing), np.empty(0, np.int64), trouble)


def _failing(failed: Outcome) -> Ask:
    """Asks nobody, because that failed already."""
    return lambda _: _none(failed.detail)
