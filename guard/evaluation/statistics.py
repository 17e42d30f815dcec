"""Rates and areas under ROC curves with their uncertainty. Imports without scipy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Rate:
    """A share with its uncertainty.

    Attributes:
        count: Number of hits.
        total: Number of trials.
        low: Lower end of the exact (Clopper–Pearson) 95 % interval.
        high: Upper end of the interval.
    """

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.total

    @classmethod
    def of(cls, count: int, total: int) -> "Rate":
        """The share `count` / `total`; `total` is at least 1."""
        from scipy.stats import binomtest

        interval = binomtest(count, total).proportion_ci(0.95, "exact")
        return cls(count, total, float(interval.low), float(interval.high))

    @property
    def brief(self) -> str:
        """Share, counts and interval, for a cell of a table."""
        return f"{self.value:.1%} ({self.count}/{self.total}; {self.low:.1%}–{self.high:.1%})"

    def __str__(self) -> str:
        return f"{self.value:6.1%}  ({self.count}/{self.total}; 95 % interval {self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Auroc:
    """How well a score ranks, with its uncertainty.

    Attributes:
        value: Probability that a positive has a larger score than a negative, ties counted half.
        low: Lower end of the 95 % interval.
        high: Upper end of the interval.
        positives: Number of positives.
        negatives: Number of negatives.
    """

    value: float
    low: float
    high: float
    positives: int
    negatives: int

    @property
    def brief(self) -> str:
        """Area and interval, for a cell of a table."""
        return f"{self.value:.3f} ({self.low:.2f}–{self.high:.2f})"


def auroc(positive: Sequence[float], negative: Sequence[float]) -> Auroc:
    """The area under the ROC curve with a 95 % interval.

    The area is the Mann–Whitney statistic. The interval is Newcombe's score interval (Statistics in Medicine 25, 2006,
    method 5): the areas θ with |area − θ| ≤ z·√V(θ), V being the variance of Hanley and McNeil (Radiology 143, 1982)
    with both sample sizes replaced by their mean. DeLong's interval and the bootstrap shrink to a point when the
    scores separate perfectly, which is what a good method does on a zoo of twenty models; this one does not.

    Args:
        positive: Scores of the positives, which should be high; finite, at least one.
        negative: Scores of the negatives, which should be low; finite, at least one.

    Raises:
        ValueError: One of them is empty, or a score is not a number.
    """
    high, low = np.asarray(positive, np.float64), np.sort(np.asarray(negative, np.float64))
    if not len(high) or not len(low):
        raise ValueError("an area under the curve needs scores of both kinds")
    if np.isnan(high).any() or np.isnan(low).any():
        raise ValueError("a score is not a number")
    below, upto = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    area = float((below + upto).mean() / 2 / len(low))
    return Auroc(
        area,
        _limit(area, 0.0, len(high), len(low)),
        _limit(area, 1.0, len(high), len(low)),
        len(high),
        len(low),
    )


def _limit(area: float, end: float, positives: int, negatives: int) -> float:
    """The limit of the score interval between the area and an end of [0, 1], by bisection."""
    size = (positives + negatives) / 2 - 1
    inside, outside = area, end
    for _ in range(60):
        middle = (inside + outside) / 2
        spread = 1 + size * (1 - middle) / (2 - middle) + size * middle / (1 + middle)
        variance = middle * (1 - middle) * spread / (positives * negatives)
        if abs(area - middle) <= _Z * math.sqrt(variance):
            inside = middle
        else:
            outside = middle
    return inside
