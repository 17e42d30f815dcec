"""The log of flagged requests, for a person to review.

A sidecar writes it (`EvidenceWriter`), `guard log` reads it (`EvidenceLog`). The package imports without torch, jinja2
and pyarrow, and loads SQLAlchemy only when a log is opened: a sidecar that keeps no log starts sooner.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.evidence.ocsf import detection_finding
from guard.evidence.records import EVIDENCE_FILE, Drop, Record, RecordFilter, thumbnail

if TYPE_CHECKING:
    from guard.evidence.exporting import export
    from guard.evidence.page import record_page
    from guard.evidence.reading import EvidenceLog
    from guard.evidence.writer import EvidenceWriter

__all__ = [
    "EVIDENCE_FILE",
    "Drop",
    "EvidenceLog",
    "EvidenceWriter",
    "Record",
    "RecordFilter",
    "detection_finding",
    "export",
    "record_page",
    "thumbnail",
]

__getattr__ = lazy(
    __name__,
    {"EvidenceLog": "reading", "EvidenceWriter": "writer", "export": "exporting", "record_page": "page"},
)
