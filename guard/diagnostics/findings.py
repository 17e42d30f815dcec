"""The findings of a check. The module imports nothing of guard, so that a broken installation can be reported too."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How good or bad one finding is."""

    OK = "ok"
    WARNING = "warning"
    """The subject needs attention, but does not keep a sidecar from starting."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: What was checked, in one word.
        status: How good or bad the result is.
        detail: The result in words.
        exit_code: Code with which a start would end because of it; 0 unless the check failed.
    """

    subject: str
    status: Status
    detail: str
    exit_code: int = 0
