"""A profile and its file: what a sidecar reads, without torch."""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.profiles.document import (
    AxisRecord,
    CalibrationRecord,
    Document,
    InputKind,
    LeftOut,
    ModelRecord,
    NearestText,
    OpinionKind,
    Reference,
    SecondOpinionRecord,
    TriggerRecord,
    VettingRecord,
)
from guard.profiles.embeddings import read_embeddings, write_embeddings
from guard.profiles.profile import Profile
from guard.profiles.storage import REPORT_FILE, check_place

if TYPE_CHECKING:
    from guard.profiles.vocabulary import read_vocabulary

__all__ = [
    "REPORT_FILE",
    "AxisRecord",
    "CalibrationRecord",
    "Document",
    "InputKind",
    "LeftOut",
    "ModelRecord",
    "NearestText",
    "OpinionKind",
    "Profile",
    "Reference",
    "SecondOpinionRecord",
    "TriggerRecord",
    "VettingRecord",
    "check_place",
    "read_embeddings",
    "read_vocabulary",
    "write_embeddings",
]

__getattr__ = lazy(__name__, {"read_vocabulary": "vocabulary"})
