"""Conformal p-values of requests, and thresholds with a guaranteed false-alarm rate. numpy only."""

import math
from dataclasses import dataclass
from typing import Self

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


def counted_above(size: int, left_out: int, alpha: float) -> int:
    """How many of the images that were left out, since they seem to carry a trigger, count as clean ones.

    Some of them may be clean, and only look like the trigger. Clean requests that look so are flagged; had such images
    been dropped without a trace, they would be flagged besides alpha, and not as a part of it. So images that were left
    out count as clean ones whose scores are above all others, as far as alpha allows: what scores higher than every
    clean image is always flagged, or else whoever slips triggered images into a calibration could switch it off.

    Args:
        size: Number of clean scores.
        left_out: Number of images that were left out.
        alpha: False-alarm rate, which `size` scores support.
    """
    return max(0, min(left_out, math.floor((alpha * (size + 1) - 1) / (1 - alpha) + _SLACK)))


def threshold(scores: NDArray[np.floating], alpha: float, left_out: int = 0) -> Threshold:
    """The smallest threshold under which clean requests are flagged at a rate of at most alpha.

    The conformal p-value of a score s against n clean scores is (1 + #{clean ≥ s}) / (n + 1) (Vovk et al., 2005); under
    exchangeability it is at most alpha with probability at most alpha, in finite samples and for any score. The
    threshold is the ⌊alpha·(n + 1)⌋-th largest clean score: above it, and only there, p ≤ alpha. The rate that one
    threshold gives is distributed over calibrations as Beta(⌊alpha·(n + 1)⌋, n + 1 − ⌊alpha·(n + 1)⌋) where scores
    have no ties.

    Args:
        scores: Scores of clean images that are in no bank, shape [n].
        alpha: False-alarm rate, in (0, 1).
        left_out: Number of images that would have a score and were left out (`counted_above`).

    Raises:
        UsageError: alpha is out of range, or smaller than 1 / (n + 1), which n scores cannot support.
    """
    size = len(scores)
    check_alpha(alpha, size)
    above = counted_above(size, left_out, alpha)
    rank = math.floor(alpha * (size + above + 1) + _SLACK) - above
    return Threshold(float(np.sort(scores)[-rank]), alpha, size)


@dataclass(frozen=True, eq=False)
class _Compared:
    """What requests are compared with.

    Attributes:
        clean: Scores of clean images in ascending order.
        above: Number of images that were left out and count as clean ones above all others.
    """

    clean: NDArray[np.floating]
    above: int

    @classmethod
    def of(cls, scores: NDArray[np.floating], left_out: int, alpha: float) -> Self:
        return cls(np.sort(scores), counted_above(len(scores), left_out, alpha))

    def p_values(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        return p_values(self.clean, values, self.above)


NONE_LEFT_OUT: NDArray[np.int64] = np.empty(0, np.int64)
"""The classes of no images."""


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
        left_out: For each image that would have a score and was left out (`counted_above`) its class, int64.

    Raises:
        UsageError: n scores do not support alpha.
    """

    def __init__(
        self,
        scores: NDArray[np.floating],
        alpha: float,
        classes: NDArray[np.int64] | None = None,
        left_out: NDArray[np.int64] = NONE_LEFT_OUT,
    ) -> None:
        check_alpha(alpha, len(scores))
        self.alpha = alpha
        self._all = _Compared.of(scores, len(left_out), alpha)
        self._own: dict[int, _Compared] = {}
        self._rare = self._all
        if classes is None:
            return
        counts = {int(k): int(count) for k, count in zip(*np.unique(classes, return_counts=True), strict=True)}
        common = [k for k, count in counts.items() if count >= needed(alpha)]
        self._own = {k: _Compared.of(scores[classes == k], int((left_out == k).sum()), alpha) for k in common}
        rest = scores[~np.isin(classes, common)]
        if len(rest) >= needed(alpha):
            self._rare = _Compared.of(rest, int((~np.isin(left_out, common)).sum()), alpha)

    @property
    def own(self) -> tuple[int, ...]:
        """Indices of the classes whose requests are compared only with images of the same class."""
        return tuple(self._own)

    def p_values(self, values: NDArray[np.floating], classes: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Conformal p-values, in [1 / (n + 1), 1]; where images were left out, the smallest is larger.

        Args:
            values: Scores of requests, shape [N].
            classes: The class that each request is predicted as, shape [N]; needed where the clean images have classes.
        """
        if not self._own or classes is None:
            return (self._rare if classes is not None else self._all).p_values(values)
        found = self._rare.p_values(values)
        for k in np.unique(classes):
            if int(k) in self._own:
                found[classes == k] = self._own[int(k)].p_values(values[classes == k])
        return found

    def flags(self, found: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether each p-value is at most alpha."""
        flags: NDArray[np.bool_] = found <= self.alpha + _SLACK
        return flags


def p_values(clean: NDArray[np.floating], values: NDArray[np.floating], above: int = 0) -> NDArray[np.float64]:
    """The conformal p-value (1 + #{clean ≥ value}) / (n + 1) of each value.

    Args:
        clean: Scores of clean images in ascending order, shape [n].
        values: Scores of requests, shape [N].
        above: Number of more clean images whose scores are above all others.
    """
    size = len(clean) + above
    found: NDArray[np.float64] = (1 + size - np.searchsorted(clean, values, side="left")) / (size + 1)
    return found
