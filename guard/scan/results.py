"""What a scan is asked for, and what it finds."""

from dataclasses import dataclass
from typing import Literal

from guard.errors import UsageError
from guard.scan.groups import Group
from guard.scan.sources import Skipped

Method = Literal["k-distance", "dao", "slof", "lid"]
ReferenceKind = Literal["sample", "batch", "shard", "global"]
Search = Literal["auto", "exact", "approximate"]
METHODS: tuple[Method, ...] = ("k-distance", "dao", "slof", "lid")
"""Scores of the coarse stage."""
REFERENCES: tuple[ReferenceKind, ...] = ("sample", "batch", "shard", "global")
"""Where they look for neighbours."""


@dataclass(frozen=True)
class ScanSettings:
    """How a training set is scanned.

    Attributes:
        method: The score of the coarse stage (`guard.scan.scores`).
        reference: Where it looks for neighbours: random `sample`s of the set, random batches of a shard with their
            captions as the released code does (`batch`), each `shard` by itself, or the whole set (`global`).
        released: Whether to reproduce the released code, with the reference `batch`.
        k: Number of neighbours.
        sample: Images in a sample; it should hold fewer than k with one trigger.
        draws: Number of samples.
        batch: Pairs in a batch.
        search: How neighbours in the whole set are searched: `auto` searches exactly up to a million pairs.
        share: Share of the pairs with the largest scores that the fine stage looks at, in (0, 1].
        most: Largest number of these.
        words: Number of words, the most common ones, whose images are searched for a pattern by their pixels.
        seed: Of samples, batches and comparisons.
    """

    method: Method = "k-distance"
    reference: ReferenceKind = "sample"
    released: bool = False
    k: int = 16
    sample: int = 256
    draws: int = 8
    batch: int = 2048
    search: Search = "auto"
    share: float = 0.1
    most: int = 100_000
    words: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.released and self.reference != "batch":
            raise UsageError("the released code has one reference; give --reference batch")
        if self.reference == "global" and self.method not in ("k-distance", "lid"):
            raise UsageError(
                f"{self.method} needs neighbours of neighbours; with --reference global, take k-distance or lid"
            )
        if self.k < 2 or not 0 < self.share <= 1:
            raise UsageError("a scan needs a k of at least 2, and a share above 0 and of at most 1")
        if self.words < 0:
            raise UsageError("the number of words cannot be negative")
        if min(self.sample, self.batch) < self.k + 2:
            raise UsageError(f"k = {self.k} needs samples and batches of at least {self.k + 2}")


@dataclass(frozen=True)
class ScanSummary:
    """What a scan found.

    Attributes:
        data: The training set, as it was named.
        model: The model that embedded it; empty where embeddings were given.
        pairs: Number of pairs that were scored.
        shards: Number of shards.
        skipped: What was left out.
        settings: How it was scanned.
        search: How neighbours in the whole set were searched: `exact`, `approximate`, or `none` if they were not.
        recall: Share of the neighbours that the approximate search found, on a sample; None for the others.
        candidates: Number of pairs that the fine stage looked at.
        groups: Groups among them, triggers first.
        poisoned: Estimated number of pairs with a trigger: of the groups `trigger` and `suspected`.
        low: Lower end of its 95 % interval: of the groups `trigger` alone.
        high: Upper end, with the groups `suspected`.
        removed: Number of pairs that the keep-list leaves out.
        embedding_seconds: Time that embedding took, of all processes together.
        scoring_seconds: Time that scoring took, of all processes together.
    """

    data: str
    model: str
    pairs: int
    shards: int
    skipped: tuple[Skipped, ...]
    settings: ScanSettings
    search: Literal["exact", "approximate", "none"]
    recall: float | None
    candidates: int
    groups: tuple[Group, ...]
    poisoned: int
    low: int
    high: int
    removed: int
    embedding_seconds: float
    scoring_seconds: float
