"""Conformal p-values of requests, and thresholds with a guaranteed false-alarm rate. numpy only."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.errors import UsageError

_SLACK = 1e-9
"""Tolerance by which 0.01 · 100 counts as 1: alpha is a decimal number, its float is not."""


@dataclass(frozen=True)
class Threshold:
    """A threshold on a score.

    Attributes:
        value: A score above it is flagged; one equal to it is not.
        alpha: Largest share of clean requests that are flagged, on average over calibrations.
        size: Number of clean scores that the threshold was set from.
    """

    value: float
    alpha: float
    size: int


def smallest_alpha(size: int) -> float:
    """The smallest false-alarm rate that this number of clean scores supports."""
    return 1 / (size + 1)


def needed(alpha: float) -> int:
    """Number of clean scores that a false-alarm rate needs."""
    return math.ceil(1 / alpha - _SLACK) - 1


def check_alpha(alpha: float, size: int) -> None:
    """Make sure that this number of clean scores supports a false-alarm rate.

    Raises:
        UsageError: alpha is not between 0 and 1, or is smaller than 1 / (size + 1).
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie between 0 and 1, not be {alpha:g}")
    if size < needed(alpha):
        raise UsageError(
            f"a false-alarm rate of {alpha:g} needs at least {needed(alpha)} clean images or texts that set the "
            f"threshold, there are {size}; "
            f"give more of them, or an alpha of at least {smallest_alpha(size):.2g}"
        )


def threshold(scores: NDArray[np.floating], alpha: float) -> Threshold:
    """The smallest threshold under which clean requests are flagged at a rate of at most alpha.

    The conformal p-value of a score s against n clean scores is (1 + #{clean ≥ s}) / (n + 1) (Vovk et al., 2005); under
    exchangeability it is at most alpha with probability at most alpha, in finite samples and for any score. The
    threshold is the ⌊alpha·(n + 1)⌋-th largest clean score: above it, and only there, p ≤ alpha. The rate that one
    threshold gives is distributed over calibrations as Beta(⌊alpha·(n + 1)⌋, n + 1 − ⌊alpha·(n + 1)⌋) where scores
    have no ties.

    Args:
        scores: Scores of clean images that are in no bank, shape [n].
        alpha: False-alarm rate, in (0, 1).

    Raises:
        UsageError: alpha is out of range, or smaller than 1 / (n + 1), which n scores cannot support.
    """
    size = len(scores)
    check_alpha(alpha, size)
    rank = math.floor(alpha * (size + 1) + _SLACK)
    return Threshold(float(np.sort(scores)[-rank]), alpha, size)


class Conformal:
    """Compares the scores of requests with the scores of clean images.

    With classes, a request is compared with the clean images that were predicted as the same class, so that the
    false-alarm rate applies to each class and not only to all requests together (a Mondrian predictor; Vovk et al.,
    2005, §4.5). Classes with too few images for alpha share one pool, and the rate applies to the pool; if even the
    pool is too small, its requests are compared with all images.

    Args:
        scores: Scores of clean images, shape [n].
        alpha: False-alarm rate, in (0, 1).
        classes: The class that each clean image is predicted as, int64, shape [n]; None to compare with all images.

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
        """Indices of the classes whose requests are compared only with images of the same class."""
        return tuple(self._own)

    def p_values(self, values: NDArray[np.floating], classes: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Conformal p-values, in [1 / (n + 1), 1].

        Args:
            values: Scores of requests, shape [N].
            classes: The class that each request is predicted as, shape [N]; needed where the clean images have classes.
        """
        if not self._own or classes is None:
            return p_values(self._rare if classes is not None else self._all, values)
        found = p_values(self._rare, values)
        for k in np.unique(classes):
            if int(k) in self._own:
                found[classes == k] = p_values(self._own[int(k)], values[classes == k])
        return found

    def flags(self, found: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether each p-value is at most alpha."""
        flags: NDArray[np.bool_] = found <= self.alpha + _SLACK
        return flags


def p_values(clean: NDArray[np.floating], values: NDArray[np.floating]) -> NDArray[np.float64]:
    """The conformal p-value (1 + #{clean ≥ value}) / (n + 1) of each value.

    Args:
        clean: Scores of clean images in ascending order, shape [n].
        values: Scores of requests, shape [N].
    """
    size = len(clean)
    found: NDArray[np.float64] = (1 + size - np.searchsorted(clean, values, side="left")) / (size + 1)
    return found
