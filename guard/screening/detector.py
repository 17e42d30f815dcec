"""Decide about requests: scores, p-values, and a false-alarm rate that the operator chose."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.screening.axis import AxisScores
from guard.screening.conformal import NONE_LEFT_OUT, Conformal, Threshold, p_values, threshold
from guard.screening.monitor import WatchedScore
from guard.screening.neighbours import Embeddings
from guard.screening.screen import DENSITY, Scores, Screen, match, matched
from guard.screening.second_opinion import OPINIONS, ReferenceAnswers

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

    A request with a second opinion is compared with clean images with one, and a request without is compared with the
    same images without, so that the false-alarm rate holds for both, whichever requests chance or the operator picks.
    Where the requests for a second opinion are picked by their other scores, clean images are picked by the same rule,
    and one comparison covers all requests.

    `guard.Profile.detector` makes one.

    Args:
        screen: Computes the scores.
        clean: Scores that the screen computed for clean images that are in no bank; with a second opinion on each if
            the screen has one.
        alpha: False-alarm rate, in (0, 1).
        per_class: Whether the rate must apply to each predicted class, not only to all requests together.
        near_only: Whether only requests that `Screen.near` picks get a second opinion.
        axes: The scores along axes, which join the others; None for none.
        left_out: For each image that has no clean score since it seems to carry a trigger, the class that this trigger
            leads to; int64. They count as clean images above all others (`guard.screening.conformal.counted_above`).

    Attributes:
        axes: As given.
        size: Number of clean scores.
        near_only: As given.
        threshold: Threshold on the score of a request with a second opinion, if the screen has one, for classes that
            have no threshold of their own.
        threshold_alone: The same for a request without a second opinion.

    Raises:
        UsageError: There are too few clean scores for alpha.
    """

    def __init__(
        self,
        screen: Screen,
        clean: Scores,
        alpha: float,
        *,
        per_class: bool = False,
        near_only: bool = False,
        axes: AxisScores | None = None,
        left_out: NDArray[np.int64] = NONE_LEFT_OUT,
    ) -> None:
        self.screen, self.alpha, self.per_class, self.near_only = screen, alpha, per_class, near_only
        self._clean, self.axes, self._left_out = clean, axes, left_out
        self.size = len(clean.values)
        alone = screen.alone(clean)
        values = np.where(screen.near(clean), clean.values, alone) if near_only else clean.values
        if axes is not None:
            values, alone = np.maximum(values, axes.clean), np.maximum(alone, axes.clean)
        self.threshold: Threshold = threshold(values, alpha, len(left_out))
        self.threshold_alone: Threshold = self.threshold if near_only else threshold(alone, alpha, len(left_out))
        classes = clean.classes if per_class else None
        self._with_opinion = Conformal(values, alpha, classes, left_out)
        self._alone = self._with_opinion if near_only else Conformal(alone, alpha, classes, left_out)
        self._parts = {name: np.sort(part) for name, part in clean.parts.items()}
        density = clean.parts[DENSITY]
        counts = np.bincount(clean.classes) if len(clean.classes) else np.zeros(0, int)
        self._of_class = {int(k): np.sort(density[clean.classes == k]) for k in np.flatnonzero(counts >= MIN_DRIFT)}
        self._watched = {stream.name for stream in self.streams()}

    def along(self, axes: AxisScores) -> "Detector":
        """The same detector with the scores along other axes."""
        kept = {"per_class": self.per_class, "near_only": self.near_only}
        return Detector(self.screen, self._clean, self.alpha, **kept, axes=axes, left_out=self._left_out)

    @property
    def triggers(self) -> tuple[str, ...]:
        """What `Scores.triggers` of a judgement refers to: ids of the reconstructed triggers, then names of axes."""
        return (*self.screen.triggers, *(axis.name for axis in (self.axes.axes if self.axes else ())))

    def named(self, scores: Scores) -> tuple[str, ...]:
        """For each request the trigger or axis that it carries, as far as the scores tell; "" for none.

        It is the one whose score decides. If another score decides, such as a second opinion, it is the trigger that
        the request matches best, provided that the match alone is as rare among clean images as alpha.
        """
        axes = {axis.name for axis in self.axes.axes} if self.axes else set()
        found = self.part_p_values(scores)
        names = []
        for row, decided in enumerate(scores.decided_by):
            name, best = decided if decided in axes else matched(decided), int(scores.triggers[row])
            if not name and 0 <= best < len(self.screen.triggers):
                candidate = self.screen.triggers[best]
                name = candidate if found[match(candidate)][row] <= self.alpha + 1e-9 else ""
            names.append(name)
        return tuple(names)

    @property
    def own_threshold(self) -> tuple[int, ...]:
        """Indices of the classes that have enough clean images for a threshold of their own."""
        return self._with_opinion.own

    def score(self, embeddings: Embeddings, answers: ReferenceAnswers | None = None) -> Judgement:
        """Score requests, and decide which of them to flag.

        Args:
            embeddings: Image embeddings of the model that the profile belongs to: float32, shape [N, D], of any length
                above 0, since they are L2-normalised here.
            answers: What the reference model computed for the same images; None for no second opinion.

        Returns:
            For each request its scores, its p-value (`Conformal.p_values`), and whether it is flagged. Larger scores
            are more suspicious; smaller p-values are.

        Raises:
            RequestError: Wrong shape, a value that is not finite, or a zero vector.
        """
        return self.judge(self.screen.score_samples(np.asarray(embeddings), answers))

    def judge(self, scores: Scores) -> Judgement:
        """Decide about requests by their scores; see `score`.

        With `near_only`, each request that `Screen.near` picks must have got its second opinion.
        """
        if self.axes is not None:
            scores = self.axes.add(scores, len(self.screen.triggers))
        classes, asked = scores.classes if self.per_class else None, scores.asked
        found = self._alone.p_values(scores.values, classes)
        if asked.any() and not self.near_only:
            found = np.where(asked, self._with_opinion.p_values(scores.values, classes), found)
        return Judgement(scores, found, self._with_opinion.flags(found))

    def part_p_values(self, scores: Scores) -> Mapping[str, NDArray[np.float64]]:
        """The uncorrected p-values of each score by name, shape [N] each: what a monitor bets on.

        NaN where a request has no such score. Those along axes are left out: an axis has a test of its own.
        """
        found = {}
        for name, values in scores.parts.items():
            if name not in self._parts:
                continue
            found[name] = np.where(np.isnan(values), np.nan, p_values(self._parts[name], values))
        return found

    def streams(self) -> tuple[WatchedScore, ...]:
        """The streams that a monitor can watch.

        The match to each trigger, the scores of a second opinion unless requests are picked for it by their other
        scores, and the density over all and per class.
        """
        scores = [match(name) for name in self.screen.triggers]
        scores += [] if self.near_only or self.screen.opinion is None else list(OPINIONS)
        attack = [WatchedScore(name, "attack", self.size) for name in scores if self.size >= MIN_ATTACK]
        drift = [WatchedScore(DRIFT, "drift", self.size)] if self.size >= MIN_DRIFT else []
        within = [WatchedScore(drift_of(k), "drift", len(clean)) for k, clean in self._of_class.items()]
        return (*attack, *drift, *within)

    def observations(self, scores: Scores) -> list[dict[str, float]]:
        """For each request its p-value in each stream that the request belongs to, by name of the stream."""
        found = self.part_p_values(scores)
        rows = []
        for row, k in enumerate(scores.classes.tolist()):
            observed = {name: float(values[row]) for name, values in found.items() if not np.isnan(values[row])}
            # What lies along an axis is explained, and no event for drift.
            explained = scores.triggers[row] >= len(self.screen.triggers)
            observed[DRIFT] = 1.0 if explained else observed[DENSITY]
            if k in self._of_class:
                density = scores.parts[DENSITY][row : row + 1]
                observed[drift_of(k)] = 1.0 if explained else float(p_values(self._of_class[k], density)[0])
            rows.append({name: value for name, value in observed.items() if name in self._watched})
        return rows


def drift_of(index: int) -> str:
    """Name of the stream that watches the density within one class."""
    return f"{DRIFT} class {index}"
