"""The log of what was flagged, for a person to review.

A sidecar writes it (`EvidenceWriter`), `guard log` reads it (`EvidenceLog`). Imports without torch, jinja2 and pyarrow.
"""

from guard.evidence.exporting import export
from guard.evidence.page import record_page
from guard.evidence.reading import EvidenceLog
from guard.evidence.records import EVIDENCE_FILE, EvidenceError, Filter, Record, thumbnail
from guard.evidence.writer import Drop, EvidenceWriter

__all__ = [
    "EVIDENCE_FILE",
    "Drop",
    "EvidenceError",
    "EvidenceLog",
    "EvidenceWriter",
    "Filter",
    "Record",
    "export",
    "record_page",
    "thumbnail",
]
