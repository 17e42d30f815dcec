"""Read, write and validate a profile; build one from a vetting, and calibrate it.

Reading imports without torch.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.profiles.embeddings import read_embeddings, write_embeddings
from guard.profiles.profile import (
    CalibrationRecord,
    Document,
    LeftOut,
    ModelRecord,
    NearestText,
    Profile,
    Reference,
    TriggerRecord,
)
from guard.profiles.storage import REPORT_FILE, check_place, read, write

if TYPE_CHECKING:
    from guard.profiles.building import build, calibrate, calibrate_embeddings, load_triggers
    from guard.profiles.vocabulary import read_vocabulary

__all__ = [
    "REPORT_FILE",
    "CalibrationRecord",
    "Document",
    "LeftOut",
    "ModelRecord",
    "NearestText",
    "Profile",
    "Reference",
    "TriggerRecord",
    "build",
    "calibrate",
    "calibrate_embeddings",
    "check_place",
    "load_triggers",
    "read",
    "read_embeddings",
    "read_vocabulary",
    "write",
    "write_embeddings",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("build", "calibrate", "calibrate_embeddings", "load_triggers"), "building"),
        "read_vocabulary": "vocabulary",
    },
)
