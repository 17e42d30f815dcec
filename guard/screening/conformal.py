"""p-values of requests against clean scores, and thresholds with a false-alarm rate that holds. numpy only."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.errors import UsageError

_SLACK = 1e-9
"""Keeps 0.01 · 100 at 1: alpha is decimal, its float is not."""


@dataclass(frozen=True)
class Threshold:
    """A threshold on a score.

    Attributes:
        value: A score above it is flagged; one equal to it is not.
        alpha: Share of clean requests that are flagged, at most and on average over calibrations.
        size: Number of clean scores behind it.
    """

    value: float
    alpha: float
    size: int


def smallest_alpha(size: int) -> float:
    """The smallest false-alarm rate that so many clean scores support."""
    return 1 / (size + 1)


def needed(alpha: float) -> int:
    """How many clean scores a false-alarm rate needs."""
    return math.ceil(1 / alpha - _SLACK) - 1


def check_alpha(alpha: float, size: int) -> None:
    """Make sure that so many clean scores support a false-alarm rate.

    Raises:
        UsageError: It is no rate, or smaller than 1 / (size + 1).
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie between 0 and 1, not be {alpha:g}")
    if size < needed(alpha):
        raise UsageError(
            f"a false-alarm rate of {alpha:g} needs at least {needed(alpha)} calibration images, there are {size}; "
            f"give more images or a larger alpha (the smallest possible is {smallest_alpha(size):.2g})"
        )


def threshold(scores: NDArray[np.floating], alpha: float) -> Threshold:
    """The smallest threshold under which clean requests are flagged at a rate of at most alpha.

    The conformal p-value of a score s against n clean scores is (1 + #{clean ≥ s}) / (n + 1) (Vovk et al., 2005); under
    exchangeability it is at most alpha with probability at most alpha, in finite samples and for any score. The
    threshold is the ⌊alpha·(n + 1)⌋-th largest clean score: above it, and only there, p ≤ alpha. Over calibrations
    the rate that one threshold gives is distributed as Beta(⌊alpha·(n + 1)⌋, n + 1 − ⌊alpha·(n + 1)⌋) where scores have
    no ties.

    Args:
        scores: Scores of clean images that went into no bank, shape [n].
        alpha: In (0, 1).

    Raises:
        UsageError: alpha is out of range, or smaller than 1 / (n + 1), which n scores cannot support.
    """
    size = len(scores)
    check_alpha(alpha, size)
    rank = math.floor(alpha * (size + 1) + _SLACK)
    return Threshold(float(np.sort(scores)[-rank]), alpha, size)


class Conformal:
    """Clean scores that requests are compared with.

    With classes, a request is compared with the clean images that were predicted as the same class, so that the
    false-alarm rate holds for each class and not only on the whole (a Mondrian predictor; Vovk et al., 2005, §4.5).
    Classes with too few images for alpha share one pool, in which the rate holds on the whole; if even that is too
    small, its requests are compared with all images.

    Args:
        scores: Clean, shape [n].
        alpha: False-alarm rate, in (0, 1).
        classes: What each was predicted as, int64, shape [n]; None to compare with all.

    Raises:
        UsageError: n scores do not support alpha.
    """

    def __init__(self, scores: NDArray[np.floating], alpha: float, classes: NDArray[np.int64] | None = None) -> None:
        check_alpha(alpha, len(scores))
        self.alpha = alpha
        self._all = np.sort(scores)
        self._own: dict[int, NDArray[np.floating]] = {}
        self._rare = self._all
        if classes is None:
            return
        counts = {int(k): int(count) for k, count in zip(*np.unique(classes, return_counts=True), strict=True)}
        common = [k for k, count in counts.items() if count >= needed(alpha)]
        self._own = {k: np.sort(scores[classes == k]) for k in common}
        rest = scores[~np.isin(classes, common)]
        if len(rest) >= needed(alpha):
            self._rare = np.sort(rest)

    @property
    def own(self) -> tuple[int, ...]:
        """The classes that are compared with themselves only."""
        return tuple(self._own)

    def p_values(self, values: NDArray[np.floating], classes: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Conformal p-values, in [1 / (n + 1), 1].

        Args:
            values: Scores of requests, shape [N].
            classes: What each was predicted as, shape [N]; needed where there are classes.
        """
        if not self._own or classes is None:
            return p_values(self._rare if classes is not None else self._all, values)
        found = p_values(self._rare, values)
        for k in np.unique(classes):
            if int(k) in self._own:
                found[classes == k] = p_values(self._own[int(k)], values[classes == k])
        return found

    def flags(self, found: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which p-values are small enough."""
        flags: NDArray[np.bool_] = found <= self.alpha + _SLACK
        return flags


def p_values(clean: NDArray[np.floating], values: NDArray[np.floating]) -> NDArray[np.float64]:
    """(1 + #{clean ≥ value}) / (n + 1) for each value.

    Args:
        clean: Ascending, shape [n].
        values: Shape [N].
    """
    size = len(clean)
    found: NDArray[np.float64] = (1 + size - np.searchsorted(clean, values, side="left")) / (size + 1)
    return found
