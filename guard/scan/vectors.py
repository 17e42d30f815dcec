"""Embeddings that lie on the disk, read in slices."""

from collections.abc import Iterator, Sequence

import numpy as np

from guard._types import Floats, Rows
from guard.scan.nearest import Embeddings

QUERIES = 8192
"""Vectors that are read, and whose neighbours are searched, at a time."""


class Unit:
    """Embeddings that are divided by their length as they are read.

    Args:
        part: Embeddings of any length.
    """

    def __init__(self, part: Embeddings) -> None:
        self._part = part
        self.shape = part.shape

    def __getitem__(self, rows: slice) -> Floats:
        values = np.array(self._part[rows], np.float32)
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        return values


def slices(count: int) -> Iterator[slice]:
    """Slices that cover a part."""
    yield from (slice(start, min(start + QUERIES, count)) for start in range(0, count, QUERIES))


def gathered(parts: Sequence[Embeddings], rows: Rows) -> Floats:
    """Some rows of embeddings that are numbered through, in ascending order."""
    found, start = [np.empty((0, parts[0].shape[1]), np.float32)], 0
    for part in parts:
        chosen = rows[(rows >= start) & (rows < start + part.shape[0])] - start
        for block in slices(part.shape[0]):
            inside = chosen[(chosen >= block.start) & (chosen < block.stop)] - block.start
            if len(inside):
                found.append(part[block][inside])
        start += part.shape[0]
    return np.concatenate(found)
