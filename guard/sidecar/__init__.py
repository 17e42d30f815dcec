"""The gRPC sidecar: it screens every inference request, as an Open Inference Protocol server or a proxy before one.

`serve` is imported on first use, so that the settings can be read without gRPC services and screening.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.sidecar.policy import Decision, FailurePolicy, Mode, Outcome, Reason, refusal
from guard.sidecar.settings import Settings

if TYPE_CHECKING:
    from guard.sidecar.host.server import serve

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

__getattr__ = lazy(__name__, {"serve": "host.server"})
