"""Search in the leading principal axes of a bank. numpy only."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from guard.screening.products import largest

_SHARE = 4
"""One number in four is kept, so that bank and head together take 1.25 times the memory of the bank."""
_ALIGNMENT = 0.5
"""The cosine that the unseen rests of a query and of its near rows are taken to have; 0.3 to 0.6 do alike."""
_BLOCK_ROWS = 4096


class Compressed:
    """Candidates by a quarter of the numbers.

    With μ the mean of the bank, a vector x − μ has coordinates h in the leading principal axes and a rest of length r.
    Then |x − y|² = |h_x − h_y|² + r_x² + r_y² − 2 r_x r_y cos θ, where θ is the angle between the rests. cos θ = 1
    gives a lower bound, cos θ = 0 what to expect of unrelated rests; near neighbours lie between. The two lengths
    become two more coordinates, so that one product ranks the whole bank.

    The embeddings of an image tower have a steep spectrum. Where it is flat (random or whitened vectors) this misses
    most neighbours.

    Args:
        bank: Shape [N, D].
    """

    def __init__(self, bank: NDArray[np.float32]) -> None:
        size, dimension = bank.shape
        kept = max(1, dimension // _SHARE - 2)
        self._mean = bank.mean(axis=0, dtype=np.float64).astype(np.float32)
        moments = np.zeros((dimension, dimension))
        for start in range(0, size, _BLOCK_ROWS):
            centred = (bank[start : start + _BLOCK_ROWS] - self._mean).astype(np.float64)
            moments += centred.T @ centred
        # Eigenvalues ascend. The signs of the axes are arbitrary, and cancel in a product of two heads.
        self._axes = np.linalg.eigh(moments)[1][:, : -kept - 1 : -1].astype(np.float32)
        # One row per coordinate: products with few, long rows are quicker than with many short ones.
        self._head = np.empty((kept + 2, size), np.float32)
        for start in range(0, size, _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            head, rests, squares = self._split(bank[rows])
            self._head[:kept, rows], self._head[kept, rows], self._head[kept + 1, rows] = head.T, rests, squares / 2

    def candidates(self, queries: NDArray[np.float32], k: int) -> Sequence[NDArray[np.int64]]:
        """For each query the rows that seem nearest: 160, and six more for each that is sought."""
        head, rests, _ = self._split(queries)
        probes = np.column_stack([head, _ALIGNMENT * rests, np.full(len(queries), -1, np.float32)])
        return largest(self._head.T @ probes.T, min(160 + 6 * k, self._head.shape[1]))

    def _split(
        self, vectors: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Leading coordinates, length of the rest and squared length, after the mean is taken away."""
        centred = vectors - self._mean
        head = centred @ self._axes
        squares = np.einsum("nd,nd->n", centred, centred)
        return head, np.sqrt(np.maximum(squares - np.einsum("nd,nd->n", head, head), 0)), squares
