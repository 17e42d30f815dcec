"""Score requests by where their embeddings lie; larger is more suspicious, always."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.screening.neighbours import Embeddings, Neighbours, SearchMethod
from guard.screening.whitening import Whitening

MAX_K = 16
"""The k of Huang et al. (ICLR 2025), whose reference is a batch of thousands."""
_FLOOR = 1e-3
"""Added to both distances of a ratio: a request that is in a bank has distance 0, and float32 resolves no less."""

DENSITY = "k-distance"
MATCH = "match"
DENSITY_WEIGHT = 0.1
"""Share of the false alarms that density may use up where there are triggers to match. On the zoo `small` of seed 0 it
costs no detection, and it is all there is against a trigger that vetting did not find."""
_TAIL = 0.9
"""Quantile above which a score is in its tail."""


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
class Tail:
    """Puts a score on a scale that all scores share: how far it lies in the tail of clean images.

    Attributes:
        start: The 90 % quantile of the score over the bank's own images, each compared with the others.
        scale: By how much the scores above it exceed it on average; above 0.
        weight: The score's share of the false alarms, in (0, 1].
    """

    start: float
    scale: float
    weight: float

    @classmethod
    def fit(cls, scores: NDArray[np.floating], weight: float) -> "Tail":
        """From scores of clean images, shape [n]."""
        start = float(np.quantile(scores, _TAIL))
        excess = scores[scores > start] - start
        return cls(start, max(float(excess.mean()) if len(excess) else 0.0, 1e-6), weight)

    def pure(self, scores: NDArray[np.floating]) -> NDArray[np.float32]:
        """How far scores lie in the tail, in units of its scale: −log of the share of it above, if exponential."""
        values: NDArray[np.float32] = ((scores - self.start) / self.scale).astype(np.float32)
        return values

    def surprise(self, scores: NDArray[np.floating]) -> NDArray[np.float32]:
        """The same, less what the weight takes off: what scores of several kinds are compared by."""
        return self.pure(scores) + np.float32(math.log(self.weight))


@dataclass(frozen=True, eq=False)
class Banks:
    """What requests are compared with; made by `Banks.fit`, kept in a profile.

    Attributes:
        whitening: Moves embeddings into the space of the banks.
        head: Class embeddings, shape [D, C]; what a request is predicted as.
        reference: Clean images, whitened, shape [N, D].
        stamped: For each reconstructed trigger the same images with it, whitened, shape [N, D].
        k: Which neighbour distances are taken to.
        tails: For each score its tail over the bank's own images.
    """

    whitening: Whitening
    head: Embeddings
    reference: Embeddings
    stamped: Mapping[str, Embeddings]
    k: int
    tails: Mapping[str, Tail]

    @classmethod
    def fit(cls, clean: Embeddings, stamped: Mapping[str, Embeddings], head: Embeddings, *, k: int) -> "Banks":
        """Whiten the banks, and learn how the scores of clean images are distributed.

        Args:
            clean: Embeddings of clean images, shape [N, D], L2-normalised.
            stamped: For each trigger those of the same images with it, in the same order.
            head: Class embeddings, shape [D, C].
            k: Which neighbour; below N.

        Raises:
            ValueError: Shapes do not fit, or there are no more than k images.
        """
        if any(bank.shape != clean.shape for bank in stamped.values()):
            raise ValueError("reference and stamped banks must hold the same images")
        if not 1 <= k < len(clean):
            raise ValueError(f"k = {k} needs more than {k} images, there are {len(clean)}")
        whitening = Whitening.fit(clean, predict(clean, head))
        reference = whitening(clean)
        moved = {name: whitening(bank) for name, bank in stamped.items()}
        own = np.arange(len(clean))
        far = last_of_others(Neighbours(reference), reference, k, own)
        scores = {DENSITY: far}
        for name, bank in moved.items():
            scores[match(name)] = ratio(far, last_of_others(Neighbours(bank), reference, k, own))
        share = (1 - DENSITY_WEIGHT) / len(moved) if moved else 0.0
        tails = {
            name: Tail.fit(values, share if name != DENSITY else DENSITY_WEIGHT if moved else 1.0)
            for name, values in scores.items()
        }
        return cls(whitening, head, reference, moved, k, tails)


def predict(embeddings: Embeddings, head: Embeddings) -> NDArray[np.int64]:
    """The class whose embedding is nearest, by cosine; shape [N]."""
    found: NDArray[np.int64] = (embeddings @ head).argmax(1)
    return found


def match(trigger: str) -> str:
    """Name of the score that compares with a trigger."""
    return f"{MATCH} {trigger}"


def ratio(reference: NDArray[np.float32], stamped: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much nearer the stamped bank is than the reference bank, as a logarithm; shape [N]."""
    found: NDArray[np.float32] = np.log((reference + _FLOOR) / (stamped + _FLOOR)).astype(np.float32)
    return found


def last_of_others(bank: Neighbours, queries: Embeddings, k: int, own: NDArray[np.int64]) -> NDArray[np.float32]:
    """Distance of each query to its k-th nearest in a bank, one row apart: that of the same image.

    Args:
        bank: More than k rows.
        queries: Shape [M, D].
        k: Which neighbour.
        own: For each query the row to leave out, −1 for none; shape [M].
    """
    found = bank.search(queries, k + 1)
    there = (found.indices == own[:, None]).any(1)
    distances: NDArray[np.float32] = np.where(there, found.distances[:, -1], found.distances[:, -2])
    return distances


@dataclass(frozen=True, eq=False)
class Scores:
    """What screening found for a batch of requests.

    Attributes:
        values: What decides: the largest surprise of all scores, shape [N].
        parts: Each score by name, shape [N] each.
        triggers: Index of the trigger that each matches best, shape [N]; −1 where there is none.
        classes: What each is predicted as by the profile's head, shape [N].
        embeddings: What was scored, L2-normalised, shape [N, D]; empty for scores that were stored.
    """

    values: NDArray[np.float32]
    parts: Mapping[str, NDArray[np.float32]]
    triggers: NDArray[np.int64]
    classes: NDArray[np.int64]
    embeddings: Embeddings = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def of(self, rows: NDArray[np.bool_]) -> "Scores":
        """Those of some requests."""
        parts = {name: scores[rows] for name, scores in self.parts.items()}
        return Scores(self.values[rows], parts, self.triggers[rows], self.classes[rows])


class Screen:
    """Scores embeddings against a reference bank and the stamped banks of reconstructed triggers.

    - *k-distance*: how far a request lies from clean images (Huang et al., ICLR 2025, use it to clean training sets).
      It sees whatever is unusual, of any attack, and little of any.
    - *match*, one per trigger: log(k-distance to the reference bank / k-distance to that trigger's stamped bank). Not
      "is this unusual?" but "is this nearer to what the trigger produces than to clean images?". It sees the attacks
      whose trigger vetting reconstructed, in whatever family.

    Each is put on one scale by its `Tail`, and the largest decides. The rule is fixed by the banks, before any
    calibration image is seen, so that a conformal threshold on it is exact.

    Args:
        banks: What to compare with.
        method: How neighbours are found.

    Raises:
        ValueError: A bank is not as described, or smaller than k.
    """

    def __init__(self, banks: Banks, *, method: SearchMethod = "exact") -> None:
        self._banks = banks
        self._neighbours = Neighbours(banks.reference, *banks.stamped.values(), method=method)
        self.triggers = tuple(banks.stamped)
        self._names = (DENSITY, *map(match, self.triggers))
        if set(banks.tails) != set(self._names):
            raise ValueError(f"tails are of {sorted(banks.tails)}, not of {sorted(self._names)}")
        if self._neighbours.size < banks.k:
            raise ValueError(f"a bank has fewer rows than k = {banks.k}")

    @property
    def dimension(self) -> int:
        """Length of the embeddings that are scored."""
        return len(self._banks.whitening.mean)

    def score_samples(self, embeddings: Embeddings) -> Scores:
        """Score requests.

        Args:
            embeddings: Shape [N, D]; normalised here, since an upstream server may not do it.

        Raises:
            RequestError: Wrong shape, a value that is not finite, or a zero vector.
        """
        unit = self._normalised(embeddings)
        distances = self._neighbours.distances(self._banks.whitening(unit), self._banks.k)
        found = np.concatenate([distances[:1], ratio(distances[0], distances[1:])])
        parts = dict(zip(self._names, found, strict=True))
        surprises = np.array([self._banks.tails[name].surprise(scores) for name, scores in parts.items()])
        triggers = surprises[1:].argmax(axis=0) if self.triggers else np.full(len(unit), -1)
        return Scores(surprises.max(axis=0), parts, triggers, predict(unit, self._banks.head), unit)

    def _normalised(self, embeddings: Embeddings) -> Embeddings:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            raise RequestError(
                f"embeddings of shape {embeddings.shape} cannot be compared with ones of {self.dimension}"
            )
        with np.errstate(over="ignore"):  # refused below; a warning for each would only fill the log
            norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise RequestError("an embedding is zero or not finite")
        unit: Embeddings = (embeddings / norms).astype(np.float32, copy=False)
        return unit
