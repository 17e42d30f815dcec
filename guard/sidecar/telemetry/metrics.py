"""All metrics of a sidecar. Labels are bounded: names of models come from the configuration, never from a request."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from guard import __version__
from guard.certificates import Admission
from guard.evidence import Drop
from guard.profiles import Profile
from guard.screening import DENSITY, DIVERGENCE, JOINT, MATCH, RESIDUAL, Alarm, matched
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Decision, FailurePolicy, Mode, Outcome, Reason
from guard.sidecar.telemetry import logs

STAGES = ("decode", "inference", "screening", "second opinion")
OPINION_RESULTS = ("agrees", "differs", "not_near", "not_drawn", "failed")
"""Whether the reference model gives an image the same class as the model, or why it was not asked or did not answer."""
SCORE_KINDS = (DENSITY, MATCH, DIVERGENCE, RESIDUAL, JOINT, "axis")
"""Kinds of scores that may decide about an image."""
STATE_KINDS = ("monitor", "sample", "evidence", "lock")
"""What a damaged file of the state was."""
UNKNOWN = "(unknown)"
"""Label `model` of all models that guard has no profile of."""
_MODEL = ("model", "version")
_P_VALUES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
_SCORES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0)
"""Scores of all models have the same units: each is calibrated to the tail of an exponential distribution.

No bucket is below 0, and no negative score is added to the sum: OpenMetrics forbids both, and a strict parser then
refuses the whole scrape.
"""
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class Distribution:
    """How many values lie between bounds.

    Attributes:
        bounds: Upper bounds, inclusive, ascending; the last is infinity.
        counts: How many values are at most the bound and above the one before it.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """What was decided about the requests for a model since the process began.

    Attributes:
        requests: Requests by decision.
        images: Images by decision.
        unchecked: Unchecked requests by reason, where there were any.
        scores: Scores of images; None for models that guard has no profile of.
        overhead: Seconds from request to reply besides those of the upstream server.
    """

    requests: Mapping[str, int]
    images: Mapping[str, int]
    unchecked: Mapping[str, int]
    scores: Distribution | None
    overhead: Distribution


class Metrics:
    """The metrics of one sidecar, in a registry of their own; `of` gives access to those of a model.

    Attributes:
        registry: The registry to expose.
        active: Number of requests in progress.
        most_active: The most requests that are handled at a time.
        upstream_up: 1 if the upstream server says that it is ready.
        ready: 1 if inference requests can be served.
        evidence_trouble: 1 while the evidence log cannot be written.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Info("guard_build", "Versions of guard and of what it runs on.", registry=self.registry).info(_build())
        self.active = self._gauge("guard_active_requests", "Requests in progress.")
        self.most_active = self._gauge("guard_active_requests_limit", "Requests in progress from which on others wait.")
        self.upstream_up = self._gauge(
            "guard_upstream_up", "1 if the upstream server says that it is ready; absent without one.", "address"
        )
        self.ready = self._gauge("guard_ready", "1 if inference requests can be served.")
        self.evidence_trouble = self._gauge("guard_evidence_trouble", "1 while the evidence log cannot be written.")
        self._refused = self._counter("guard_refused", "Refused requests, by gRPC status code.", "code")
        self._tls_failures = self._counter(
            "guard_tls_reload_failures", "Times that changed TLS files could not be used."
        )
        self._evidence_dropped = self._counter(
            "guard_evidence_dropped", "Records that were not written to the evidence log, by reason.", "reason"
        )
        self._state_damaged = self._counter(
            "guard_state_damaged", "Files of the state that could not be used and were moved aside, by kind.", "kind"
        )
        self.requests = self._counter("guard_requests", "Inference requests, by decision.", *_MODEL, "decision", "mode")
        self.images = self._counter("guard_images", "Images, by decision.", *_MODEL, "decision")
        self.unchecked = self._counter(
            "guard_unchecked", "Requests that were not checked, by reason.", *_MODEL, "reason"
        )
        self.flagged = self._counter(
            "guard_flagged_trigger", "Flagged images, by the trigger that they match.", *_MODEL, "trigger"
        )
        self.triggers = self._gauge(
            "guard_trigger_info", "1 for each reconstructed trigger, with the class that it leads to.",
            *_MODEL, "trigger", "family", "target",
        )  # fmt: skip
        self.deciding = self._counter(
            "guard_flagged_score", "Flagged images, by the kind of the score that decided.", *_MODEL, "score"
        )
        self.second_opinions = self._counter(
            "guard_second_opinions",
            "Images, by whether the reference model gives them the same class, or why it gives none.",
            *_MODEL,
            "result",
        )
        self.second_looks = self._counter(
            "guard_second_looks", "Second looks at flagged images, by outcome.", *_MODEL, "outcome"
        )
        self.alarms = self._counter("guard_alarms", "Alarms raised by the stream monitor, by kind.", *_MODEL, "kind")
        self.alarm = self._gauge(
            "guard_alarm",
            "1 while an alarm of the stream monitor is active, by kind and stream.",
            *_MODEL,
            "kind",
            "stream",
        )
        self.request_seconds = self._histogram(
            "guard_request_duration_seconds", "Seconds from request to reply.", _SECONDS, *_MODEL
        )
        self.upstream_seconds = self._histogram(
            "guard_upstream_duration_seconds", "Seconds that the upstream server took for a request.", _SECONDS, *_MODEL
        )
        self.overhead_seconds = self._histogram(
            "guard_overhead_seconds",
            "Seconds from request to reply besides those of the upstream server; not of streams.",
            _SECONDS,
            *_MODEL,
        )
        self.stage_seconds = self._histogram(
            "guard_check_duration_seconds", "Seconds in each stage of a check.", _SECONDS, *_MODEL, "stage"
        )
        self.scores = self._histogram(
            "guard_score", "Score of each image, 0 if it is below; larger is more suspicious.", _SCORES, *_MODEL
        )
        self.p_values = self._histogram(
            "guard_p_value",
            "p-value of each image. Clean traffic fills the buckets in proportion to their width.",
            _P_VALUES,
            *_MODEL,
        )
        self.model = Info(
            "guard_model", "A served model: its digest, its verdict and its policy.", _MODEL, registry=self.registry
        )
        self.alpha = self._gauge("guard_alpha_ratio", "p-value up to which an image is flagged.", *_MODEL)
        self.threshold = self._gauge("guard_threshold", "Score above which an image is flagged.", *_MODEL)
        self.reference = self._gauge("guard_reference_size", "Embeddings in the reference bank.", *_MODEL)
        self.reloads = self._counter("guard_profile_reloads", "Times that a changed profile was loaded.", *_MODEL)
        self.reload_failures = self._counter(
            "guard_profile_reload_failures", "Times that a changed profile could not be used.", *_MODEL
        )
        self.stale = self._gauge(
            "guard_profile_stale", "1 while the profile on disk cannot be used and an older one stays in use.", *_MODEL
        )
        self.certified = self._gauge(
            "guard_model_certified", "1 if the trust policies accept the certificate of the model, else 0.", *_MODEL
        )
        self.certificate_expiry = self._gauge(
            "guard_certificate_expiry_timestamp_seconds", "When the certificate of the model expires.", *_MODEL
        )
        # All series are created at the start, here and below, so that a count of none is exposed as 0.
        self._refused.labels("RESOURCE_EXHAUSTED")
        for drop in Drop:
            self._evidence_dropped.labels(drop)
        for kind in STATE_KINDS:
            self._state_damaged.labels(kind)

    def of(self, settings: ModelSettings) -> "ModelMetrics":
        """The metrics of a model that guard has a profile of."""
        return ModelMetrics(self, settings.model_name, settings.model_version or "", settings.mode, settings.on_failure)

    def of_unknown(self, settings: ModelSettings) -> "ModelMetrics":
        """The metrics of all models that guard has no profile of."""
        return ModelMetrics(self, UNKNOWN, "", settings.mode, settings.on_failure)

    def refused(self, code: str) -> None:
        """Count a refused request, by one of the seventeen status codes of gRPC."""
        self._refused.labels(code).inc()

    def evidence_dropped(self, reason: Drop, number: int) -> None:
        """Count records that were not written to the evidence log."""
        self._evidence_dropped.labels(reason).inc(number)

    def state_damaged(self, kind: str) -> None:
        """Count a file of the state that could not be used, by one of `STATE_KINDS`."""
        self._state_damaged.labels(kind).inc()

    def tls_reload_failed(self) -> None:
        """Count changed TLS files that could not be used."""
        self._tls_failures.inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class ModelMetrics:
    """The metrics of one model. Series are looked up once, since looking one up costs more than counting.

    Args:
        all_: The metrics of the sidecar.
        name: Value of the label `model`.
        version: Value of the label `version`; "" if the configuration names no version.
        mode: Mode of the model.
        on_failure: Failure policy of the model.
    """

    def __init__(self, all_: Metrics, name: str, version: str, mode: Mode, on_failure: FailurePolicy) -> None:
        self._all, self._name = all_, (name, version)
        self._mode, self._on_failure = mode, on_failure
        self._requests = {decision: all_.requests.labels(*self._name, decision, mode) for decision in Decision}
        self._images = {decision: all_.images.labels(*self._name, decision) for decision in Decision}
        self._unchecked = {reason: all_.unchecked.labels(*self._name, reason) for reason in Reason}
        self._stages = {stage: all_.stage_seconds.labels(*self._name, stage) for stage in STAGES}
        self._seconds = all_.request_seconds.labels(*self._name)
        self._upstream = all_.upstream_seconds.labels(*self._name)
        self._overhead = all_.overhead_seconds.labels(*self._name)
        self._triggers: dict[str, Counter] = {}
        self._described: list[tuple[str, ...]] = []
        self._active_alarms: set[tuple[str, str]] = set()
        if name == UNKNOWN:
            return
        self._deciding = {kind: all_.deciding.labels(*self._name, kind) for kind in SCORE_KINDS}
        self._opinions = {result: all_.second_opinions.labels(*self._name, result) for result in OPINION_RESULTS}
        self._scores = all_.scores.labels(*self._name)
        self._p_values = all_.p_values.labels(*self._name)
        self._alarms = {kind: all_.alarms.labels(*self._name, kind) for kind in ("attack", "drift")}
        self._reloads, self._failures = all_.reloads.labels(*self._name), all_.reload_failures.labels(*self._name)
        self._stale = all_.stale.labels(*self._name)

    def describe(self, profile: Profile, alpha: float, threshold: float, second_opinion: str) -> None:
        """Expose what the model is screened with; called at the start and after its profile was reloaded.

        Args:
            profile: Its profile.
            alpha: p-value up to which an image is flagged.
            threshold: Score above which an image is flagged.
            second_opinion: Which requests get a second opinion, see `ModelSettings.opinions`.
        """
        document = profile.document
        self._all.model.labels(*self._name).info(
            {
                "digest": document.model.digest,
                "verdict": document.vetting.verdict.outcome,
                "mode": self._mode,
                "failure_policy": self._on_failure,
                "second_opinion": second_opinion,
            }
        )
        self._all.alpha.labels(*self._name).set(alpha)
        self._all.threshold.labels(*self._name).set(threshold)
        if document.calibration is not None:
            self._all.reference.labels(*self._name).set(document.calibration.reference)
        compared = document.compared(document.inputs)
        found = {trigger.id for trigger in compared}
        for labels in self._described:
            self._all.triggers.remove(*labels)
        self._described = [
            (*self._name, trigger.id, trigger.family, profile.class_name(trigger.target)) for trigger in compared
        ]
        for labels in self._described:
            self._all.triggers.labels(*labels).set(1)
        for gone in self._triggers.keys() - found:
            self._all.flagged.remove(*self._name, gone)
        self._triggers = {trigger: self._all.flagged.labels(*self._name, trigger) for trigger in found}

    def certified(self, admission: Admission) -> None:
        """Expose the decision about the model's certificate."""
        self._all.certified.labels(*self._name).set(int(admission.admitted))
        if admission.expires is not None:
            self._all.certificate_expiry.labels(*self._name).set(admission.expires.timestamp())

    def reloaded(self, *, taken: bool) -> None:
        """Count a changed profile.

        Args:
            taken: Whether the changed profile is now in use.
        """
        (self._reloads if taken else self._failures).inc()
        self._stale.set(int(not taken))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage of a request."""
        started = perf_counter()
        try:
            yield
        finally:
            self._stages[name].observe(perf_counter() - started)

    def observe(self, outcome: Outcome, images: int, seconds: float) -> None:
        """Count a finished request.

        Args:
            outcome: The outcome of the request.
            images: The number of images that the request carried, as far as that is known.
            seconds: Seconds from request to reply.
        """
        self._requests[outcome.decision].inc()
        exemplar = _exemplar()
        self._seconds.observe(seconds, exemplar)
        if outcome.decision is Decision.UNCHECKED and outcome.reason is not None:
            self._unchecked[outcome.reason].inc()
        if outcome.scores is None or outcome.flags is None:
            self._images[Decision.UNCHECKED].inc(images)
            return
        for decision in outcome.decisions:
            self._images[decision].inc()
        for score in outcome.scores[np.isfinite(outcome.scores)]:
            self._scores.observe(max(0.0, float(score)), exemplar)
        for row in np.flatnonzero(outcome.flags):
            # The profile that named the trigger may have been replaced meanwhile.
            if outcome.decided_by:
                self._deciding[_kind(outcome.decided_by[row])].inc()
            if counter := self._triggers.get(outcome.triggers[row]):
                counter.inc()

    def upstream(self, seconds: float, whole: float) -> None:
        """Measure a request that was forwarded.

        Args:
            seconds: Seconds that the upstream server took.
            whole: Seconds from request to reply.
        """
        self._upstream.observe(seconds)
        self._overhead.observe(max(0.0, whole - seconds))

    def second_opinions(self, result: str, images: int) -> None:
        """Count images by what came of a second opinion on them, one of `OPINION_RESULTS`."""
        if images:
            self._opinions[result].inc(images)

    def p_values(self, values: NDArray[np.float64]) -> None:
        """Count the p-values of images, shape [N]."""
        for value in values:
            self._p_values.observe(float(value))

    def state_damaged(self, kind: str) -> None:
        """Count a file of the state that could not be used."""
        self._all.state_damaged(kind)

    def second_look(self, outcome: str) -> None:
        """Count a second look by its outcome, one of four."""
        self._all.second_looks.labels(*self._name, outcome).inc()

    @property
    def traffic(self) -> Traffic:
        """What was decided so far."""
        unchecked = {reason: _count(counter) for reason, counter in self._unchecked.items()}
        return Traffic(
            {decision: _count(counter) for decision, counter in self._requests.items()},
            {decision: _count(counter) for decision, counter in self._images.items()},
            {reason: count for reason, count in unchecked.items() if count},
            None if self._name[0] == UNKNOWN else _distribution(self._scores),
            _distribution(self._overhead),
        )

    @property
    def alarmed(self) -> bool:
        """Whether any alarm is exposed as active."""
        return bool(self._active_alarms)

    def alarms(self, active: Sequence[Alarm], raised: Sequence[Alarm]) -> None:
        """Expose which alarms are active, and count new ones.

        Args:
            active: All active alarms; there are at most as many streams as triggers and classes.
            raised: The alarms that are new.
        """
        now_active: set[tuple[str, str]] = {(alarm.kind, alarm.stream) for alarm in active}
        for kind, stream in self._active_alarms - now_active:
            self._all.alarm.labels(*self._name, kind, stream).set(0)
        for kind, stream in now_active:
            self._all.alarm.labels(*self._name, kind, stream).set(1)
        self._active_alarms = now_active
        for alarm in raised:
            self._alarms[alarm.kind].inc()


def _count(counter: Counter) -> int:
    (family,) = counter.collect()
    return int(next(sample.value for sample in family.samples if sample.name.endswith("_total")))


def _distribution(histogram: Histogram) -> Distribution:
    (family,) = histogram.collect()
    buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
    bounds = tuple(float(sample.labels["le"]) for sample in buckets)
    # Prometheus adds up all that is below a bound.
    counts = np.diff([sample.value for sample in buckets], prepend=0).astype(int)
    return Distribution(bounds, tuple(counts.tolist()))


def _build() -> dict[str, str]:
    """Versions, and the commit that guard was installed from, where pip recorded one (PEP 610)."""
    found = {"version": __version__, "python": platform.python_version(), "revision": ""}
    with suppress(metadata.PackageNotFoundError, ValueError, AttributeError):
        origin = json.loads(metadata.distribution("clip-guard").read_text("direct_url.json") or "{}")
        found["revision"] = str(origin.get("vcs_info", {}).get("commit_id", ""))
    for package in ("onnxruntime-gpu", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            found["onnxruntime"] = metadata.version(package)
            break
    return found


def _kind(name: str) -> str:
    """The kind of a score, one of `SCORE_KINDS`: triggers are counted elsewhere, and axes have names of their own."""
    if matched(name):
        return MATCH
    return name if name in SCORE_KINDS else "axis"


def _exemplar() -> dict[str, str] | None:
    """The trace id of the current request, which OpenMetrics shows beside the bucket that the request fell into."""
    trace = logs.origin().trace_id
    return {"trace_id": trace} if trace else None
