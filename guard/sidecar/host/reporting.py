"""What a sidecar reports of itself, as messages of `guard.v1`: for the admin service, and for the page of its own."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from types import MappingProxyType

from guard import __version__
from guard.certificates import Admission
from guard.evidence import Record
from guard.evidence.records import clean
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.decisions.evidence import Follower, Recorder
from guard.sidecar.decisions.models import Models, Served
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.host import pictures
from guard.sidecar.host.health import Health
from guard.sidecar.policy import Decision, FailurePolicy, Mode
from guard.sidecar.setting_sources import Source
from guard.sidecar.telemetry.metrics import Distribution, Metrics, Traffic

_MODES = MappingProxyType(
    {Mode.SHADOW: messages.MODE_SHADOW, Mode.TAG: messages.MODE_TAG, Mode.BLOCK: messages.MODE_BLOCK}
)
_MODES_BY_NAME = MappingProxyType({str(mode): message for mode, message in _MODES.items()})
_POLICIES = MappingProxyType(
    {
        FailurePolicy.OPEN: messages.FAILURE_POLICY_OPEN,
        FailurePolicy.CLOSED: messages.FAILURE_POLICY_CLOSED,
    }
)
_OUTCOMES = MappingProxyType(
    {
        "backdoored": messages.Verdict.OUTCOME_BACKDOORED,
        "no evidence": messages.Verdict.OUTCOME_NO_EVIDENCE,
        "inconclusive": messages.Verdict.OUTCOME_INCONCLUSIVE,
    }
)
_KINDS = MappingProxyType({"attack": messages.Alarm.KIND_ATTACK, "drift": messages.Alarm.KIND_DRIFT})
_DECISIONS = MappingProxyType(
    {str(Decision.PASS): messages.Evidence.DECISION_PASS, str(Decision.FLAG): messages.Evidence.DECISION_FLAG}
)
_SOURCES = MappingProxyType(
    {
        Source.DEFAULT: messages.Setting.SOURCE_DEFAULT,
        Source.FILE: messages.Setting.SOURCE_FILE,
        Source.ENVIRONMENT: messages.Setting.SOURCE_ENVIRONMENT,
        Source.OPTION: messages.Setting.SOURCE_OPTION,
    }
)
MAX_RECENT = 1000
"""The most records of the evidence log that are handed out at once."""


class Reporter:
    """Reports what a sidecar is and does; its methods may be called from any thread.

    Args:
        shared: What the models share.
        models: The models that are served.
        health: Health of the sidecar.
        metrics: Metrics of the sidecar.

    Attributes:
        recorder: Records flagged images, for those who follow them.
    """

    def __init__(self, shared: Shared, models: Models, health: Health, metrics: Metrics) -> None:
        self._shared, self._models, self._health, self._metrics = shared, models, health, metrics
        self._started = datetime.now(UTC)
        self.recorder = shared.evidence

    @property
    def labels(self) -> frozenset[str]:
        """Labels of the models in the evidence log."""
        return frozenset(clean(served.settings.label) for served in self._models.served)

    def status(self) -> messages.Status:
        """What this process is, and whether it serves."""
        reason, trouble = self._health.reason, self._shared.evidence.trouble
        (active,) = self._metrics.active.collect()
        return messages.Status(
            version=__version__,
            process=self._shared.process,
            started_at=self._started,
            ready=reason is None,
            reason=reason or "",
            upstream=self._shared.settings.upstream or "",
            active_requests=int(active.samples[0].value),
            evidence_trouble=trouble or "",
        )

    def models(self, *, with_pictures: bool = False) -> messages.ListModelsResponse:
        """What the models are screened with, and what was decided; may wait for a disk, as requests must not."""
        return messages.ListModelsResponse(
            models=[_model(served, with_pictures=with_pictures) for served in self._models.served],
            unknown_models=_traffic(self._models.unknown.metrics.traffic),
        )

    def configuration(self) -> messages.Configuration:
        """The settings in effect."""
        return messages.Configuration(
            settings=[
                messages.Setting(model=each.model, name=each.name, value=each.value, source=_SOURCES[each.source])
                for each in self._shared.settings.effective
            ]
        )


def _model(served: Served, *, with_pictures: bool) -> messages.Model:
    # Read once, since the checker is replaced when the profile changes.
    checker, settings = served.checker, served.settings
    document = checker.profile.document
    verdict, calibration = document.vetting.verdict, document.calibration
    model = messages.Model(
        name=settings.model_name,
        version=served.version,
        label=settings.label,
        digest=document.model.digest,
        verdict=messages.Verdict(
            outcome=_OUTCOMES[verdict.outcome],
            target_class="" if verdict.target is None else checker.profile.class_name(verdict.target),
            p_value=verdict.p_value if math.isfinite(verdict.p_value) else None,
        ),
        mode=_MODES[settings.mode],
        failure_policy=_POLICIES[settings.on_failure],
        alpha=checker.alpha,
        threshold=checker.watch.threshold,
        triggers=[
            messages.Trigger(
                id=each.id,
                family=each.family,
                target_class=checker.profile.class_name(each.target),
                success=each.success,
                picture=pictures.drawn(checker.profile, each)
                if with_pictures and document.inputs == "images"
                else None,
            )
            for each in document.compared(document.inputs)
        ],
        alarms=[messages.Alarm(kind=_KINDS[alarm.kind], stream=alarm.stream) for alarm in checker.watch.alarms],
        loaded_at=served.since,
        stale=served.stale,
        certificate=None if checker.certification is None else _certificate(checker.certification.admission),
        traffic=_traffic(checker.metrics.traffic),
    )
    if calibration is not None:
        model.reference_size = calibration.reference
        model.calibration.images = calibration.threshold.size
        model.calibration.held_out_images = calibration.held_out
        model.calibration.held_out_false_alarms = calibration.false_alarms
        if checker.opinions is not None and (opinion := calibration.second_opinion) is not None:
            model.second_opinion.requests = checker.opinions.rule
            model.second_opinion.kind, model.second_opinion.digest = opinion.kind, opinion.digest
            model.second_opinion.agreement = opinion.agreement
    return model


def _certificate(admission: Admission) -> messages.Certificate:
    return messages.Certificate(accepted=admission.admitted, reason=admission.reason, expires_at=admission.expires)


def _traffic(traffic: Traffic) -> messages.Traffic:
    return messages.Traffic(
        requests=traffic.requests,
        images=traffic.images,
        unchecked=traffic.unchecked,
        scores=None if traffic.scores is None else _histogram(traffic.scores),
        overhead_seconds=_histogram(traffic.overhead),
    )


def _histogram(distribution: Distribution) -> messages.Histogram:
    return messages.Histogram(bounds=distribution.bounds, counts=distribution.counts)


async def told(
    recorder: Recorder, follower: Follower, wants: Callable[[Record], bool], *, recent: int, with_thumbnails: bool
) -> AsyncIterator[messages.Evidence]:
    """What a follower is told: the newest records of the log, oldest first, then images as they are recorded.

    Args:
        recorder: Records flagged images.
        follower: One of its followers, with the same wishes; made before, so that nothing is missed in between.
        wants: Whether a record is wanted.
        recent: The most records of the log; at most `MAX_RECENT`.
        with_thumbnails: Whether messages contain pictures.
    """
    for record in await asyncio.to_thread(recorder.recent, min(recent, MAX_RECENT), wants):
        yield evidence(record, 0, with_thumbnail=with_thumbnails)
    while (found := await follower.next()) is not None:
        yield evidence(*found, with_thumbnail=with_thumbnails)


def evidence(record: Record, lost: int, *, with_thumbnail: bool) -> messages.Evidence:
    """A record of the log as a message.

    Args:
        record: The record.
        lost: Records before it that the reader lost.
        with_thumbnail: Whether it contains the picture or the text, if there is one.
    """
    return messages.Evidence(
        lost=lost,
        time=datetime.fromisoformat(record.time),
        request_id=record.request_id,
        trace_id=record.trace_id,
        model=record.model,
        model_digest=record.model_digest,
        image=record.image,
        # A record that was read from a file may contain anything.
        decision=_DECISIONS.get(record.decision),
        mode=_MODES_BY_NAME.get(record.mode),
        predicted_class=record.predicted,
        p_value=record.p_value,
        alpha=record.alpha,
        scores=record.scores,
        thresholds=record.thresholds,
        trigger=record.trigger,
        target_class=record.target,
        second_look=record.second_look,
        explanation=record.explanation,
        input_digest=record.input_digest,
        thumbnail=record.thumbnail if with_thumbnail else None,
        text=record.text if with_thumbnail else "",
        decided_by=record.decided_by,
        reference_class=record.reference,
        record=record.id,
    )
