"""Decide about requests: scores, p-values, and a false-alarm rate that the operator chose."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.screening.conformal import Conformal, Threshold, p_values, threshold
from guard.screening.monitor import WatchedScore
from guard.screening.neighbours import Embeddings
from guard.screening.screen import DENSITY, Scores, Screen, match

MIN_ATTACK, MIN_DRIFT = 99, 99
"""Number of clean scores that a monitored stream needs; with fewer its bounds are too wide to notice anything."""
DRIFT = "drift"


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a detector decides about a batch of requests.

    Attributes:
        scores: The scores of each request, the trigger that it matches best, and the class that it is predicted as.
        p_values: Conformal p-value of each request: how often a clean request scores as high; float64, shape [N].
        flags: Whether each request is flagged, because its p-value is at most alpha; bool, shape [N].
    """

    scores: Scores
    p_values: NDArray[np.float64]
    flags: NDArray[np.bool_]


class Detector:
    """Decides about requests: compares their scores with the scores of clean images.

    `guard.Profile.detector` makes one.

    Args:
        screen: Computes the scores.
        clean: Scores that the screen computed for clean images that are in no bank.
        alpha: False-alarm rate, in (0, 1).
        per_class: Whether the rate must apply to each predicted class, not only to all requests together.

    Attributes:
        size: Number of clean scores.
        threshold: Threshold on the score of a request, for classes that have no threshold of their own.

    Raises:
        UsageError: There are too few clean scores for alpha.
    """

    def __init__(self, screen: Screen, clean: Scores, alpha: float, *, per_class: bool = False) -> None:
        self.screen, self.alpha, self.per_class = screen, alpha, per_class
        self.size = len(clean.values)
        self.threshold: Threshold = threshold(clean.values, alpha)
        self._conformal = Conformal(clean.values, alpha, clean.classes if per_class else None)
        self._parts = {name: np.sort(values) for name, values in clean.parts.items()}
        density = clean.parts[DENSITY]
        counts = np.bincount(clean.classes) if len(clean.classes) else np.zeros(0, int)
        self._of_class = {int(k): np.sort(density[clean.classes == k]) for k in np.flatnonzero(counts >= MIN_DRIFT)}
        self._watched = {stream.name for stream in self.streams()}

    @property
    def own_threshold(self) -> tuple[int, ...]:
        """Indices of the classes that have enough clean images for a threshold of their own."""
        return self._conformal.own

    def score(self, embeddings: Embeddings) -> Judgement:
        """Score requests, and decide which of them to flag.

        Args:
            embeddings: Image embeddings of the model that the profile belongs to: float32, shape [N, D], of any length
                above 0, since they are L2-normalised here.

        Returns:
            For each request its scores, its p-value in [1 / (n + 1), 1], and whether it is flagged. Larger scores are
            more suspicious; smaller p-values are.

        Raises:
            RequestError: Wrong shape, a value that is not finite, or a zero vector.
        """
        scores = self.screen.score_samples(np.asarray(embeddings))
        found = self._conformal.p_values(scores.values, scores.classes if self.per_class else None)
        return Judgement(scores, found, self._conformal.flags(found))

    def part_p_values(self, scores: Scores) -> Mapping[str, NDArray[np.float64]]:
        """The uncorrected p-values of each score by name, shape [N] each: what a monitor bets on."""
        return {name: p_values(clean, scores.parts[name]) for name, clean in self._parts.items()}

    def streams(self) -> tuple[WatchedScore, ...]:
        """The streams that a monitor can watch: the match to each trigger, and the density over all and per class."""
        attack = [
            WatchedScore(match(name), "attack", self.size) for name in self.screen.triggers if self.size >= MIN_ATTACK
        ]
        drift = [WatchedScore(DRIFT, "drift", self.size)] if self.size >= MIN_DRIFT else []
        within = [WatchedScore(drift_of(k), "drift", len(clean)) for k, clean in self._of_class.items()]
        return (*attack, *drift, *within)

    def observations(self, scores: Scores) -> list[dict[str, float]]:
        """For each request its p-value in each stream that the request belongs to, by name of the stream."""
        found = self.part_p_values(scores)
        rows = []
        for row, k in enumerate(scores.classes.tolist()):
            observed = {match(name): float(found[match(name)][row]) for name in self.screen.triggers}
            observed[DRIFT] = float(found[DENSITY][row])
            if k in self._of_class:
                density = scores.parts[DENSITY][row : row + 1]
                observed[drift_of(k)] = float(p_values(self._of_class[k], density)[0])
            rows.append({name: value for name, value in observed.items() if name in self._watched})
        return rows


def drift_of(index: int) -> str:
    """Name of the stream that watches the density within one class."""
    return f"{DRIFT} class {index}"
