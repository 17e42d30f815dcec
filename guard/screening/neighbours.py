"""Exact nearest-neighbour distances to a fixed bank. numpy only."""

import numpy as np
from numpy.typing import NDArray

Embeddings = NDArray[np.float32]

_BLOCK_BYTES = 64 * 2**20
"""Largest intermediate matrix of distances."""


class Neighbours:
    """Distances to the k-th nearest of a bank of unit vectors.

    On unit vectors the squared Euclidean distance is 2 − 2·cos, so that one matrix product gives all distances.

    Args:
        bank: Shape [N, D], L2-normalised.
        k: Which neighbour; 1 ≤ k ≤ N.

    Raises:
        ValueError: k is out of range, or the bank is not a finite matrix of unit vectors.
    """

    def __init__(self, bank: Embeddings, k: int) -> None:
        if bank.ndim != 2 or not len(bank):
            raise ValueError(f"a bank is a matrix of embeddings, not an array of shape {bank.shape}")
        if not 1 <= k <= len(bank):
            raise ValueError(f"k = {k} needs a bank of at least {k} embeddings, it has {len(bank)}")
        norms = np.linalg.norm(bank, axis=1)
        if not np.allclose(norms, 1, atol=1e-3):  # NaN fails this too
            raise ValueError("the embeddings of a bank must be L2-normalised")
        self.k = k
        self._transposed = np.ascontiguousarray(bank.T, dtype=np.float32)

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self._transposed.shape[0])

    def kth_distance(self, embeddings: Embeddings) -> NDArray[np.float32]:
        """Euclidean distance of each embedding to its k-th nearest in the bank.

        Args:
            embeddings: Shape [M, D], L2-normalised.

        Returns:
            Shape [M], in [0, 2].
        """
        rows = max(1, _BLOCK_BYTES // (4 * self._transposed.shape[1]))
        parts = [
            np.partition(embeddings[i : i + rows] @ self._transposed, -self.k, axis=1)[:, -self.k]
            for i in range(0, len(embeddings), rows)
        ]
        cosine = np.concatenate(parts) if parts else np.empty(0, np.float32)
        distance: NDArray[np.float32] = np.sqrt(np.maximum(2 - 2 * cosine, 0)).astype(np.float32)
        return distance
