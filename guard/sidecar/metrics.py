"""Every metric that a sidecar exposes. Labels are bounded: model names come from the configuration, never a request."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from guard import __version__
from guard.evidence import Drop
from guard.profiles import Profile
from guard.screening import Alarm
from guard.sidecar import logs
from guard.sidecar.policy import Decision, FailurePolicy, Mode, Outcome, Reason

STAGES = ("decode", "inference", "screening")
_P_VALUES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The metrics of one sidecar, in a registry of their own.

    Args:
        model: Name under which the model is served.
        mode: In force.
        on_failure: In force.
        profile: Of the served model.
    """

    def __init__(self, model: str, mode: Mode, on_failure: FailurePolicy, profile: Profile) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._requests = Counter(
            "guard_requests", "Inference requests by decision.", ["model", "decision", "mode"], registry=self.registry
        )
        self._mode = mode
        self._images = Counter("guard_images", "Images by decision.", ["model", "decision"], registry=self.registry)
        self._unchecked = Counter(
            "guard_unchecked", "Requests that could not be checked.", ["model", "reason"], registry=self.registry
        )
        self._refused = Counter(
            "guard_refused", "Requests refused, by gRPC code.", ["model", "code"], registry=self.registry
        )
        self._flagged = Counter(
            "guard_flagged_trigger", "Flagged images by matched trigger.", ["model", "trigger"], registry=self.registry
        )
        self._duration = Histogram(
            "guard_check_duration_seconds",
            "Time in each stage of a request.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._requests_seconds = Histogram(
            "guard_request_duration_seconds",
            "Time from request to reply.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tls_failures = Counter(
            "guard_tls_reload_failures", "Changed TLS files that were not taken.", registry=self.registry
        )
        self.active = Gauge("guard_active_requests", "Requests in progress.", registry=self.registry)
        self.ready = Gauge("guard_ready", "1 if inference requests can be served.", registry=self.registry)
        self._scores = Histogram(
            "guard_score",
            "Score of each image; larger is more suspicious. A bucket ends at the threshold.",
            ["model"],
            buckets=_score_buckets(profile),
            registry=self.registry,
        )
        self._p_values = Histogram(
            "guard_p_value",
            "p-value of each image. Clean traffic fills the buckets in proportion to their width.",
            ["model"],
            buckets=_P_VALUES,
            registry=self.registry,
        )
        self._alarm = Gauge(
            "guard_alarm",
            "1 while the stream monitor's alarm is up, by kind and stream.",
            ["model", "kind", "stream"],
            registry=self.registry,
        )
        self._alarms = Counter(
            "guard_alarms", "Alarms that the stream monitor raised.", ["model", "kind"], registry=self.registry
        )
        self._second_looks = Counter(
            "guard_second_looks", "Second looks at flagged images.", ["model", "outcome"], registry=self.registry
        )
        self._evidence_dropped = Counter(
            "guard_evidence_dropped",
            "Records that the evidence log lost, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.evidence_trouble = Gauge(
            "guard_evidence_trouble", "1 while the evidence log cannot be written.", registry=self.registry
        )
        self._up: set[tuple[str, str]] = set()
        self._describe(profile, on_failure)
        # Created now, so that "none so far" reads 0 and not "no data".
        for decision in Decision:
            self._requests.labels(model, decision, mode)
            self._images.labels(model, decision)
        for reason in Reason:
            self._unchecked.labels(model, reason)
        self._refused.labels(model, "RESOURCE_EXHAUSTED")
        for kind in ("attack", "drift"):
            self._alarms.labels(model, kind)
        for drop in Drop:
            self._evidence_dropped.labels(drop)
        for stage in STAGES:
            self._duration.labels(model, stage)
        for trigger in profile.document.triggers:
            self._flagged.labels(model, trigger.id)

    def _describe(self, profile: Profile, on_failure: FailurePolicy) -> None:
        document, calibration = profile.document, profile.document.calibration
        Info("guard_build", "Version of guard.", registry=self.registry).info({"version": __version__})
        Info("guard_model", "The served model and its verdict.", registry=self.registry).info(
            {
                "model": self._model,
                "digest": document.model.digest,
                "verdict": document.vetting.verdict.outcome,
                "mode": self._mode,
                "failure_policy": on_failure,
            }
        )
        if calibration is not None:
            for name, text, value in (
                ("guard_alpha_ratio", "False-alarm rate that the threshold was set for.", calibration.threshold.alpha),
                ("guard_threshold", "Score above which an image is flagged.", calibration.threshold.value),
                ("guard_reference_size", "Embeddings in the reference bank.", calibration.reference),
            ):
                Gauge(name, text, ["model"], registry=self.registry).labels(self._model).set(value)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage of a request."""
        started = perf_counter()
        try:
            yield
        finally:
            self._duration.labels(self._model, name).observe(perf_counter() - started)

    def observe(self, outcome: Outcome, images: int, seconds: float) -> None:
        """Count a finished request.

        Args:
            outcome: What guard found.
            images: How many it carried, as far as known.
            seconds: From request to reply.
        """
        self._requests.labels(self._model, outcome.decision, self._mode).inc()
        exemplar = _exemplar()
        self._requests_seconds.labels(self._model).observe(seconds, exemplar)
        if outcome.reason is not None:
            self._unchecked.labels(self._model, outcome.reason).inc()
        if outcome.scores is None or outcome.flags is None:
            self._images.labels(self._model, Decision.UNCHECKED).inc(images)
            return
        flagged = int(outcome.flags.sum())
        self._images.labels(self._model, Decision.FLAG).inc(flagged)
        self._images.labels(self._model, Decision.PASS).inc(len(outcome.flags) - flagged)
        for score in outcome.scores:
            self._scores.labels(self._model).observe(float(score), exemplar)
        for row in np.flatnonzero(outcome.flags):
            if outcome.triggers[row]:
                self._flagged.labels(self._model, outcome.triggers[row]).inc()

    def p_values(self, values: NDArray[np.float64]) -> None:
        """Count p-values of images."""
        for value in values:
            self._p_values.labels(self._model).observe(float(value))

    def second_look(self, outcome: str) -> None:
        """Count a second look; outcomes are four."""
        self._second_looks.labels(self._model, outcome).inc()

    def evidence_dropped(self, reason: Drop, number: int) -> None:
        """Count records that are lost."""
        self._evidence_dropped.labels(reason).inc(number)

    def tls_reload_failed(self) -> None:
        """Count changed TLS files that were not taken."""
        self._tls_failures.inc()

    @property
    def alarmed(self) -> bool:
        """Whether any alarm is shown as up."""
        return bool(self._up)

    def alarms(self, active: Sequence[Alarm], raised: Sequence[Alarm]) -> None:
        """Show which alarms are up, and count new ones. Streams are as many as triggers and classes, at most."""
        up: set[tuple[str, str]] = {(alarm.kind, alarm.stream) for alarm in active}
        for kind, stream in self._up - up:
            self._alarm.labels(self._model, kind, stream).set(0)
        for kind, stream in up:
            self._alarm.labels(self._model, kind, stream).set(1)
        self._up = up
        for alarm in raised:
            self._alarms.labels(self._model, alarm.kind).inc()

    def refused(self, code: str) -> None:
        """Count a refused request; the codes are gRPC's seventeen."""
        self._refused.labels(self._model, code).inc()


def _exemplar() -> dict[str, str] | None:
    """The trace of the current request, which OpenMetrics shows beside the bucket that it fell into."""
    trace = logs.origin().trace_id
    return {"trace_id": trace} if trace else None


def _score_buckets(profile: Profile) -> tuple[float, ...]:
    """Buckets at quantiles of the calibration scores, the threshold, and steps above it."""
    if profile.reference is None or profile.document.calibration is None:
        return (0.0, 1.0)
    scores, value = profile.reference.clean.values, profile.document.calibration.threshold.value
    spread = max(float(scores.std()), 1e-3)
    quantiles = np.quantile(scores, [0.01, 0.1, 0.5, 0.9, 0.99])
    return tuple(
        sorted({round(float(edge), 6) for edge in [*quantiles, value, *(value + spread * np.array([1, 2, 4, 8]))]})
    )
