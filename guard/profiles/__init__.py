"""Read, write and validate a profile; build one from a vetting, and calibrate it.

Reading imports without torch.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.profiles.profile import (
    CalibrationRecord,
    Document,
    ModelRecord,
    NearestText,
    Profile,
    Reference,
    TriggerRecord,
)
from guard.profiles.storage import REPORT_FILE, check_place, read, write

if TYPE_CHECKING:
    from guard.profiles.building import build, calibrate, load_triggers
    from guard.profiles.vocabulary import read_vocabulary

__all__ = [
    "REPORT_FILE",
    "CalibrationRecord",
    "Document",
    "ModelRecord",
    "NearestText",
    "Profile",
    "Reference",
    "TriggerRecord",
    "build",
    "calibrate",
    "check_place",
    "load_triggers",
    "read",
    "read_vocabulary",
    "write",
]

__getattr__ = lazy(
    __name__,
    {**dict.fromkeys(("build", "calibrate", "load_triggers"), "building"), "read_vocabulary": "vocabulary"},
)
