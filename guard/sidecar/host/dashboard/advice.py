"""What a person should do about a sidecar, from what it reports; one page of docs/runbooks for each kind."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.policy import Reason

RUNBOOKS = "https://github.com/clip-guard/guard/blob/main/docs/runbooks"
"""Where the runbooks of alerts are published."""
NOT_A_FAULT = (Reason.DISABLED, Reason.NOT_SAMPLED, Reason.CANCELLED)
"""Reasons for `unchecked` that the operator or the client asked for."""
_WARNING = timedelta(days=14)
_UNCHECKED_SHARE = 0.05
_ATTACK, _DRIFT = messages.Alarm.KIND_ATTACK, messages.Alarm.KIND_DRIFT


@dataclass(frozen=True)
class Condition:
    """Something that a person should know.

    Attributes:
        severity: `critical` for what somebody must look at now, `warning` for this working day.
        title: What it is.
        advice: What to do first.
        runbook: Name of the page in docs/runbooks.
        model: Label of the model; "" for the whole sidecar.
    """

    severity: Literal["critical", "warning"]
    title: str
    advice: str
    runbook: str
    model: str = ""


def of_sidecar(status: messages.Status) -> Iterator[Condition]:
    """What concerns the whole process."""
    if not status.ready:
        yield Condition(
            "critical",
            f"Requests are not served: {status.reason}",
            "Look at the log of the sidecar, and at the server behind it.",
            "GuardNotReady",
        )
    if status.evidence_trouble:
        yield Condition(
            "warning",
            f"The evidence log cannot be written: {status.evidence_trouble}",
            "Make room on the disk or repair its permissions. Requests are screened all the same.",
            "GuardEvidenceLost",
        )


def of_model(model: messages.Model, now: datetime) -> Iterator[Condition]:
    """What concerns one model."""
    if model.verdict.outcome == messages.Verdict.OUTCOME_BACKDOORED:
        yield Condition(
            "critical",
            f"The vetting found a backdoor that leads to “{model.verdict.target_class}”",
            "Replace the model. Screening protects its clients only until then.",
            "GuardAttack",
            model.label,
        )
    for alarm in model.alarms:
        if alarm.kind == _ATTACK:
            advice = "Look at the flagged requests below. If they carry a trigger, block and replace the model."
            what = f"Requests match {alarm.stream} more often than clean ones do"
            yield Condition("critical", what, advice, "GuardAttack", model.label)
        elif alarm.kind == _DRIFT:
            advice = "Compare recent images with those of the calibration, and calibrate again with images like them."
            what = f"Requests are no longer like the calibration images ({alarm.stream})"
            yield Condition("warning", what, advice, "GuardDrift", model.label)
    if model.stale:
        yield Condition(
            "warning",
            "The files on disk cannot be used, so older ones stay in use",
            "Look for the reason in the log of the sidecar, then write the profile and the model again.",
            "GuardProfileStale",
            model.label,
        )
    yield from _of_certificate(model, now)
    requests = sum(model.traffic.requests.values())
    faults = sum(count for reason, count in model.traffic.unchecked.items() if reason not in NOT_A_FAULT)
    if requests and faults > _UNCHECKED_SHARE * requests:
        yield Condition(
            "warning",
            # A share, since a text that changes with each request would be read aloud again, and lose the focus.
            f"{faults / requests:.0%} of the requests were not checked",
            "The reasons are below; each has its remedy in the documentation of failures.",
            "GuardUncheckedRequests",
            model.label,
        )


def _of_certificate(model: messages.Model, now: datetime) -> Iterator[Condition]:
    if not model.HasField("certificate"):
        return
    certificate = model.certificate
    if not certificate.accepted:
        yield Condition(
            "critical",
            f"The certificate is not accepted: {certificate.reason}",
            "Find out whether the model was replaced. If it is the right one, have it vetted and certified again.",
            "GuardModelNotCertified",
            model.label,
        )
    elif certificate.HasField("expires_at") and certificate.expires_at.ToDatetime(UTC) - now < _WARNING:
        yield Condition(
            "warning",
            f"The certificate expires at {certificate.expires_at.ToDatetime(UTC):%Y-%m-%d %H:%M} UTC",
            "Certify the model again before that; no restart is needed.",
            "GuardCertificateExpires",
            model.label,
        )
