"""Score requests by where their embeddings lie. numpy only; larger is more suspicious, always."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.screening.neighbours import Embeddings, Neighbours

MAX_K = 16
"""The k of Huang et al. (ICLR 2025), whose reference is a batch of thousands."""
_FLOOR = 1e-3
"""Added to both distances of a ratio: a request that is in a bank has distance 0, and float32 resolves no less."""

DENSITY = "k-distance"
MATCH = "trigger match"


def default_k(bank: int, classes: int) -> int:
    """Which neighbour to take distances to.

    The reference bank holds about bank / classes genuine images of the target class. If k is a large part of these,
    the k-th clean neighbour of a genuine image lies at the edge of its class or in another, and genuine images of the
    target look triggered. So k is a fortieth of a class's share, at least 2 and at most `MAX_K`
    (benchmarks/results/neighbour.md).

    Args:
        bank: Images in the reference bank.
        classes: Number of classes.
    """
    return max(2, min(MAX_K, bank // (40 * classes)))


@dataclass(frozen=True)
class Scores:
    """What screening found for a batch of requests.

    Attributes:
        values: Shape [N].
        triggers: Index of the trigger that each matches best, shape [N]; −1 where none was reconstructed.
    """

    values: NDArray[np.float32]
    triggers: NDArray[np.int64]


class Screen:
    """Scores embeddings against a reference bank and the stamped banks of reconstructed triggers.

    Without a trigger the score is the k-distance to the reference bank: how far a request lies from clean images
    (Huang et al., ICLR 2025, use it to clean training sets). With triggers it is the trigger match: the largest, over
    triggers, of log(k-distance to the reference bank / k-distance to that trigger's stamped bank), which asks not
    "is this unusual?" but "is this nearer to what the trigger produces than to clean images?".

    Args:
        reference: Embeddings of clean images, shape [N, D], L2-normalised.
        stamped: For each reconstructed trigger the embeddings of images stamped with it, shape [M, D].
        k: Which neighbour distances are taken to.

    Raises:
        ValueError: A bank is not as described, or smaller than k.
    """

    def __init__(self, reference: Embeddings, stamped: Mapping[str, Embeddings], *, k: int = MAX_K) -> None:
        self._reference = Neighbours(reference, k)
        self._stamped = [Neighbours(bank, k) for bank in stamped.values()]
        self.triggers = tuple(stamped)
        if any(bank.dimension != self._reference.dimension for bank in self._stamped):
            raise ValueError("reference and stamped banks must hold embeddings of one length")

    @property
    def score(self) -> str:
        """Which score this computes."""
        return MATCH if self._stamped else DENSITY

    @property
    def dimension(self) -> int:
        """Length of the embeddings that are scored."""
        return self._reference.dimension

    def score_samples(self, embeddings: Embeddings) -> Scores:
        """Score requests.

        Args:
            embeddings: Shape [N, D]; normalised here, since an upstream server may not do it.

        Raises:
            RequestError: Wrong shape, a value that is not finite, or a zero vector.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            raise RequestError(
                f"embeddings of shape {embeddings.shape} cannot be compared with ones of {self.dimension}"
            )
        with np.errstate(over="ignore"):  # refused below; a warning for each would only fill the log
            norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise RequestError("an embedding is zero or not finite")
        unit = (embeddings / norms).astype(np.float32, copy=False)
        reference = self._reference.kth_distance(unit)
        if not self._stamped:
            return Scores(reference, np.full(len(unit), -1))
        ratios = np.stack([np.log((reference + _FLOOR) / (bank.kth_distance(unit) + _FLOOR)) for bank in self._stamped])
        return Scores(ratios.max(0), ratios.argmax(0))
