"""Read, write and validate a profile; build one from a vetting, and calibrate it.

Reading imports without torch.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.profiles.profile import CalibrationRecord, Document, ModelRecord, Profile, Reference, TriggerRecord
from guard.profiles.storage import REPORT_FILE, check_place, read, write

if TYPE_CHECKING:
    from guard.profiles.building import build, calibrate, load_triggers

__all__ = [
    "REPORT_FILE",
    "CalibrationRecord",
    "Document",
    "ModelRecord",
    "Profile",
    "Reference",
    "TriggerRecord",
    "build",
    "calibrate",
    "check_place",
    "load_triggers",
    "read",
    "write",
]

__getattr__ = lazy(__name__, dict.fromkeys(("build", "calibrate", "load_triggers"), "building"))
