"""The gRPC sidecar: an Open Inference Protocol server, or a proxy before one, that screens every inference request."""

from guard.findings import Finding, Status
from guard.sidecar.policy import Decision, FailurePolicy, Mode, Outcome, Reason, refusal
from guard.sidecar.preflight import preflight
from guard.sidecar.server import serve
from guard.sidecar.settings import Settings

__all__ = [
    "Decision",
    "FailurePolicy",
    "Finding",
    "Mode",
    "Outcome",
    "Reason",
    "Settings",
    "Status",
    "preflight",
    "refusal",
    "serve",
]
