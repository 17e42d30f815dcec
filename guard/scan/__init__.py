"""Find the poisoned pairs of a training set of images and captions.

Two stages: embed every pair with the model that was trained on the set, then score the embeddings (`guard.scan.scores`)
and examine the most suspicious ones together (`guard.scan.fine`).
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.scan.groups import Group, Pattern
from guard.scan.results import METHODS, REFERENCES, ScanSettings, ScanSummary
from guard.scan.sources import Columns, Pair, Shard, Skipped, find_shards

if TYPE_CHECKING:
    from guard.scan.scanning import scan
    from guard.scan.writing import document

__all__ = [
    "METHODS",
    "REFERENCES",
    "Columns",
    "Group",
    "Pair",
    "Pattern",
    "ScanSettings",
    "ScanSummary",
    "Shard",
    "Skipped",
    "document",
    "find_shards",
    "scan",
]

__getattr__ = lazy(__name__, {"scan": "scanning", "document": "writing"})
