"""The gRPC sidecar: an Open Inference Protocol server, or a proxy before one, that screens every inference request."""

from guard.sidecar.host.server import serve
from guard.sidecar.policy import Decision, FailurePolicy, Mode, Outcome, Reason, refusal
from guard.sidecar.settings import Settings

__all__ = [
    "Decision",
    "FailurePolicy",
    "Mode",
    "Outcome",
    "Reason",
    "Settings",
    "refusal",
    "serve",
]
