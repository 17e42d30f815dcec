"""The second stage of a scan: scores of every pair, shard by shard, each of which can be interrupted and resumed."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from guard._documents import read_document
from guard._files import replace_file
from guard._safetensors import open_tensors
from guard._types import Floats, Rows
from guard.baselines.density import dimension
from guard.errors import DataError, GuardError
from guard.scan.nearest import Embeddings, Found, Reference
from guard.scan.results import ScanSettings
from guard.scan.scores import Sampled, Scores, batch, released
from guard.scan.store import FORMAT, StoredShard
from guard.scan.vectors import slices

_MAX_NOTE = 2**20
AUTO_EXACT = 1_000_000
"""Pairs up to which neighbours in the whole set are searched exactly unless somebody asks otherwise."""


class Searcher(Protocol):
    """Finds neighbours in the whole set."""

    def search(self, queries: Floats, k: int, *, without: Rows | None = None) -> Found:
        """See `Reference.search`."""


@dataclass(frozen=True)
class _Note:
    """How the scores of a shard came about.

    Attributes:
        stamp: Digest of what they depend on.
        seconds: Time that scoring took.
        recall: Share of the true neighbours that an approximate search found, on a sample; None for an exact one.
    """

    stamp: str
    seconds: float
    recall: float | None


class StoredScores:
    """The scores of one shard on disk.

    Args:
        stem: Path of its files without their suffix.
    """

    def __init__(self, stem: Path) -> None:
        self._tensors, self._note = stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def finished(self, stamp: str) -> bool:
        """Whether the shard was scored from exactly this."""
        try:
            return self.note.stamp == stamp and self._tensors.is_file()
        except GuardError:
            return False

    @property
    def note(self) -> "_Note":
        """How the scores came about."""
        return read_document(self._note, _Note, _MAX_NOTE, DataError)

    def read(self, name: str) -> NDArray[np.float64]:
        """A score of each pair; shape [N].

        Raises:
            DataError: The file is damaged.
        """
        return np.frombuffer(self._bytes(name, "F64"), np.float64)

    def _bytes(self, name: str, dtype: str) -> bytearray:
        with open_tensors(self._tensors, DataError) as file:
            if name not in file.entries or file.entries[name].dtype != dtype:
                raise DataError(f"{self._tensors} is damaged: it has no {name}; delete it")
            return file.read(name)

    def write(self, stamp: str, scores: Scores, seconds: float, recall: float | None) -> None:
        """Write the scores; the note comes last."""
        self._note.unlink(missing_ok=True)
        replace_file(self._tensors, save({name: np.ascontiguousarray(values) for name, values in scores.items()}))
        replace_file(self._note, json.dumps(asdict(_Note(stamp, round(seconds, 3), recall))).encode())


class Scorer:
    """Scores shards of one set, by what the settings ask for.

    Args:
        shards: All shards of the set.
        settings: How to score.
        device: Where neighbours are searched.

    Raises:
        DataError: There are too few pairs.
        UsageError: The approximate search misses too many neighbours.
        MissingDependencyError: It needs faiss, which is not installed.
    """

    def __init__(self, shards: Sequence[StoredShard], settings: ScanSettings, device: torch.device) -> None:
        self.settings, self._shards, self._device = settings, shards, device
        self._parts: list[Embeddings] = [shard.image for shard in shards]
        self._starts = np.cumsum([0, *(part.shape[0] for part in self._parts)])
        self.size = int(self._starts[-1])
        self.approximate = settings.reference == "global" and (
            settings.search == "approximate" or (settings.search == "auto" and self.size > AUTO_EXACT)
        )
        self._recall: float | None = None

    @cached_property
    def _samples(self) -> Sampled:
        settings = self.settings
        return Sampled(
            self._parts, settings.sample, settings.draws, settings.k, seed=settings.seed, device=self._device
        )

    @cached_property
    def _everywhere(self) -> Searcher:
        """The search in the whole set; an index is built when it is first needed."""
        if not self.approximate:
            return Reference(self._parts, device=self._device)
        from guard.scan.approximate import Approximate

        index = Approximate(self._parts, self.settings.k, seed=self.settings.seed)
        self._recall = index.recall
        return index

    def stamp(self, number: int) -> str:
        """Digest of everything that the scores of a shard depend on."""
        made_from = [FORMAT, asdict(self.settings), number, [shard.note.stamp for shard in self._shards]]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    def score(self, number: int, place: StoredScores) -> bool:
        """Score one shard; returns whether there was anything to do."""
        made_from = self.stamp(number)
        if place.finished(made_from):
            return False
        started = time.monotonic()
        scores = self._score(number)
        place.write(made_from, scores, time.monotonic() - started, self._recall)
        return True

    def _score(self, number: int) -> Scores:
        settings, shard, count = self.settings, self._shards[number], self._parts[number].shape[0]
        scores: Scores = {settings.method: np.zeros(count)}
        order = np.arange(count)
        if settings.reference == "batch":
            np.random.default_rng([settings.seed, number]).shuffle(order)
            for part in np.array_split(order, -(-count // settings.batch) or 1):
                self._fill(scores, part, self._within(shard, np.sort(part)) if len(part) else {})
        elif settings.reference == "shard" and count:
            self._fill(scores, order, self._within(shard, order))
        elif settings.reference in ("sample", "global"):
            for rows in slices(count):
                self._fill(scores, order[rows], self._block(number, rows))
        return scores

    @staticmethod
    def _fill(scores: Scores, rows: Rows, found: Scores) -> None:
        for name, values in found.items():
            scores.setdefault(name, np.zeros(len(next(iter(scores.values())))))[np.sort(rows)] = values

    def _within(self, shard: StoredShard, part: Rows) -> Scores:
        settings = self.settings
        if len(part) < settings.k + 2:
            raise DataError(
                f"a batch or a shard has only {len(part)} pairs for k = {settings.k}; use another --reference"
            )
        # With the captions, as published.
        text = np.array(shard.text[part]) if settings.reference == "batch" else None
        score = released if settings.released else batch
        return score(np.array(shard.image[part]), text, settings.k, (settings.method,), device=self._device)

    def _block(self, number: int, rows: slice) -> Scores:
        queries, start = np.array(self._parts[number][rows]), int(self._starts[number]) + rows.start
        if self.settings.reference == "sample":
            return self._samples.scores(queries, start, (self.settings.method,))
        itself = np.arange(start, start + len(queries))[:, None]
        found = self._everywhere.search(queries, self.settings.k, without=itself)
        return {"k-distance": found.distances[:, -1].astype(np.float64), "lid": dimension(found.distances)}
