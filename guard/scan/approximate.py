"""Approximate neighbours in a set of many millions, by an inverted file of the faiss library, with measured recall."""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from guard._types import Floats, Rows
from guard.errors import UsageError
from guard.scan.nearest import Embeddings, Found, Reference, sampled
from guard.scan.vectors import gathered, slices
from guard.screening.approximate import import_faiss

RECALL = 0.95
"""Share of the true neighbours that the search must find on a sample. The k-th distance grows little when
one in twenty neighbours is missed."""
_PROBES = 512
_TRAINING = 64
"""Vectors for each cell when the cells are laid out."""


class Approximate:
    """Neighbours in an inverted file with 16-bit numbers: about 2 bytes for each number of the set in memory.

    Args:
        parts: Embeddings of all images.
        k: Number of neighbours that will be asked for.
        seed: Of the sample that cells are laid out by, and of the one that recall is measured on.

    Raises:
        MissingDependencyError: faiss is not installed.
        UsageError: Even a search of a quarter of all cells does not find enough.
    """

    def __init__(self, parts: Sequence[Embeddings], k: int, *, seed: int) -> None:
        faiss = import_faiss()
        self.size = sum(part.shape[0] for part in parts)
        dimension = parts[0].shape[1]
        cells = max(1, round(2 * sqrt(self.size)))
        self._quantizer = faiss.IndexFlatL2(dimension)
        self._index = faiss.IndexIVFScalarQuantizer(
            self._quantizer, dimension, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2
        )
        self._index.cp.seed = seed
        self._index.cp.min_points_per_centroid = 1  # of a small set; it would be warned of on the terminal
        self._index.train(gathered(parts, sampled(self.size, _TRAINING * cells, seed)))
        for part in parts:
            for rows in slices(part.shape[0]):
                self._index.add(np.ascontiguousarray(part[rows]))
        self.recall = self._tune(parts, k, cells, seed)

    def search(self, queries: Floats, k: int, *, without: Rows | None = None) -> Found:
        """As `Reference.search`, but for misses, and distances from 16-bit numbers."""
        spared = 0 if without is None else without.shape[1]
        squares, rows = self._index.search(np.ascontiguousarray(queries), k + spared)
        # Where too few are found, faiss says the largest float.
        distances = np.sqrt(np.maximum(squares, 0)).astype(np.float32)
        if without is not None:
            left = (rows[:, :, None] == without[:, None, :]).any(2)
            order = np.argsort(left, axis=1, kind="stable")[:, :k]
            distances, rows = np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)
        return Found(distances, rows)

    def _tune(self, parts: Sequence[Embeddings], k: int, cells: int, seed: int) -> float:
        """Search as many cells as the recall needs; returns the recall."""
        chosen = sampled(self.size, _PROBES, seed + 1)
        queries, itself = gathered(parts, chosen), chosen[:, None]
        right = Reference(parts).search(queries, k, without=itself).rows
        self._index.nprobe = 1
        while True:
            found = self.search(queries, k, without=itself).rows
            recall = float(np.mean((right[:, :, None] == found[:, None, :]).any(2)))
            if recall >= RECALL:
                return recall
            if self._index.nprobe * 4 > cells:
                raise UsageError(
                    f"the approximate search finds only {recall:.0%} of the neighbours in a quarter of all cells; "
                    "search exactly (--neighbours exact), or take another --reference"
                )
            self._index.nprobe *= 2
