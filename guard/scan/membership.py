"""Which pairs belong to a group, and how many there are, with an interval."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats

_ROUNDS = 100
_RESAMPLES = 200
_BINS = 512
"""The two distributions are fitted to a histogram, so that resampling costs nothing at any size."""


@dataclass(frozen=True)
class Membership:
    """How the pairs that may belong to a group divide.

    Attributes:
        probabilities: That each belongs to it, in [0, 1], shape [N].
        count: Estimated number that do.
        low: Lower end of its 95 % interval.
        high: Upper end.
        separation: Distance of the two means in units of the common spread (Ashman's D, 1994): with less than 2 there
            is one hump, not two.
    """

    probabilities: NDArray[np.float64]
    count: int
    low: int
    high: int
    separation: float


def projections(embeddings: Floats, group: Floats, others: Floats) -> NDArray[np.float64]:
    """How far embeddings lie from the mean of others towards the mean of a group: 0 at the first, 1 at the second."""
    centre = others.mean(0, dtype=np.float64)
    axis = group.mean(0, dtype=np.float64) - centre
    found: NDArray[np.float64] = (embeddings - centre) @ axis / max(float(axis @ axis), 1e-12)
    return found


def membership(values: NDArray[np.float64], members: NDArray[np.bool_], *, seed: int) -> Membership:
    """Divide pairs between a group and the rest by a mixture of two normal distributions.

    Both start from what is known: the group as it was found, and all others. Expectation and maximisation then settle
    shares, means and spreads. A pair further along the axis than the mean of the group cannot belong to it less than
    one at the mean, as the tails of a wider distribution would have it. The interval is that of resampled pairs: what
    it does not hold is that the distributions may be others.

    Args:
        values: Projections of the pairs, shape [N].
        members: The group as it was found, shape [N].
        seed: Of the resampling.
    """
    if members.all() or members.sum() < 2:
        count = int(members.sum())
        return Membership(members.astype(np.float64), count, count, count, 0.0)
    edges = np.linspace(values.min(), values.max() + 1e-9, _BINS + 1)
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
    centres = (edges[1:] + edges[:-1]) / 2
    own = np.bincount(places[members], minlength=_BINS).astype(np.float64)
    counts = np.bincount(places, minlength=_BINS).astype(np.float64)
    start = np.where(counts > 0, own / np.maximum(counts, 1), 0.0)
    probabilities = _divide(centres, counts, start)
    generator = np.random.default_rng(seed)
    total = len(values)
    resampled = generator.multinomial(total, counts / total, size=_RESAMPLES).astype(np.float64)
    found = [float((row * _divide(centres, row, probabilities)).sum()) for row in resampled]
    low, high = np.quantile(found, [0.025, 0.975])
    each = probabilities[places]
    separation = _separation(centres, counts, probabilities)
    return Membership(each, round(float(each.sum())), int(np.floor(low)), int(np.ceil(high)), separation)


def _separation(centres: NDArray[np.float64], counts: NDArray[np.float64], probabilities: NDArray[np.float64]) -> float:
    parts = [_moments(centres, counts * share) for share in (probabilities, 1 - probabilities)]
    if None in parts:
        return 0.0
    (first, one), (second, two) = (part for part in parts if part is not None)
    return float(np.sqrt(2) * (first - second) / np.sqrt(one**2 + two**2))


def _moments(centres: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float] | None:
    """Mean and spread; None where there is next to nothing."""
    total = float(weights.sum())
    if total < 1:
        return None
    mean = float((weights * centres).sum() / total)
    spread = float(np.sqrt((weights * (centres - mean) ** 2).sum() / total))
    return mean, max(spread, 2 * float(centres[1] - centres[0]))


def _divide(
    centres: NDArray[np.float64], counts: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The probability of each bin to belong to the group."""
    probabilities = start
    for _ in range(_ROUNDS):
        group, rest = counts * probabilities, counts * (1 - probabilities)
        one, two = _moments(centres, group), _moments(centres, rest)
        if one is None or two is None:
            break
        densities = [
            np.log(weights.sum()) - np.log(spread) - (centres - mean) ** 2 / (2 * spread**2)
            for weights, (mean, spread) in ((group, one), (rest, two))
        ]
        odds = np.clip(densities[0] - densities[1], -50, 50)
        # Beyond the mean of the group odds do not fall again, nor do they rise below the mean of the rest.
        above, below = centres >= one[0], centres <= two[0]
        odds[above] = np.maximum.accumulate(odds[above])
        odds[below] = np.minimum.accumulate(odds[below][::-1])[::-1]
        new = 1 / (1 + np.exp(-odds))
        if np.abs(new - probabilities).max() < 1e-4:
            break
        probabilities = new
    return probabilities
