"""Thresholds with a false-alarm rate that holds: split conformal prediction. numpy only."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.errors import UsageError


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


def threshold(scores: NDArray[np.floating], alpha: float) -> Threshold:
    """The smallest threshold under which clean requests are flagged at a rate of at most alpha.

    The conformal p-value of a score s against n clean scores is (1 + #{clean ≥ s}) / (n + 1) (Vovk et al., 2005); under
    exchangeability it is at most alpha with probability at most alpha, in finite samples and for any score. The
    threshold is the ⌊alpha·(n + 1)⌋-th largest clean score: above it, and only there, p ≤ alpha.

    Args:
        scores: Scores of clean images that went into no bank, shape [n].
        alpha: In (0, 1).

    Raises:
        UsageError: alpha is out of range, or smaller than 1 / (n + 1), which n scores cannot support.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie between 0 and 1, not be {alpha:g}")
    size = len(scores)
    # The tolerance keeps 0.01 · 100 at 1: alpha is decimal, its float is not.
    rank = math.floor(alpha * (size + 1) + 1e-9)
    if rank < 1:
        raise UsageError(
            f"a false-alarm rate of {alpha:g} needs at least {math.ceil(1 / alpha) - 1} calibration images, there are "
            f"{size}; give more images or a larger alpha (the smallest possible is {1 / (size + 1):.2g})"
        )
    return Threshold(float(np.sort(scores)[-rank]), alpha, size)
