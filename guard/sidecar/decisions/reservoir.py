"""A uniform sample of the traffic, for the next calibration."""

import numpy as np

from guard._types import Floats


class Reservoir:
    """A uniform sample of a stream of embeddings (Vitter's algorithm R), including those of flagged images.

    Without those of flagged images the next threshold would be too low.

    Args:
        size: The most embeddings that are kept.
        dimension: Length of an embedding.
        seed: Seed for the random choice of embeddings.
    """

    def __init__(self, size: int, dimension: int, *, seed: int = 0) -> None:
        self._kept = np.empty((size, dimension), np.float32)
        self._seen, self._generator = 0, np.random.default_rng(seed)

    @property
    def embeddings(self) -> Floats:
        """The sample, shape [n, D]."""
        return self._kept[: min(self._seen, len(self._kept))]

    def add(self, embeddings: Floats) -> None:
        """Offer embeddings, shape [N, D], to the sample."""
        for embedding in embeddings:
            place = self._seen if self._seen < len(self._kept) else int(self._generator.integers(self._seen + 1))
            if place < len(self._kept):
                self._kept[place] = embedding
            self._seen += 1
