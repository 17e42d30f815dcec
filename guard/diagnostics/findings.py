"""What a command that looks at things found. Imports nothing, so that a broken installation can be told too."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Of one finding."""

    OK = "ok"
    WARNING = "warning"
    """It does not keep a sidecar from starting."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """What was looked at, and how it is.

    Attributes:
        subject: What was looked at.
        status: How it is.
        detail: In words.
        exit_code: That a start would end with for this, 0 unless it failed.
    """

    subject: str
    status: Status
    detail: str
    exit_code: int = 0
