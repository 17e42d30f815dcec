"""Triggers that the model did not learn, or hides well: a pattern in the pixels of pairs with a common word.

Density scores look at embeddings, and see nothing of a trigger that moves them little. A trigger that is the same in
all its images moves their pixels, whether or not the model has learned it. So for each of the most common words the
fine detail of images with this word is searched for a direction along which a few of them stand apart from all others.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats, Rows
from guard.scan.captions import Captions, Reader
from guard.scan.groups import detail, words
from guard.scan.membership import Membership

_SAMPLE = 4000
"""Images of a word that are searched."""
_FEWEST, _MOST = 100, 0.5
"""A word is searched for if so many captions have it, and no more than this share of them."""
_SIDE = 48
"""Images are reduced, by whole factors, as long as they stay at least so large."""
_STARTS = ((1, 1.0), (1, 0.03), (1, 0.005), (3, 0.03), (3, 0.005))
"""What the search begins with: the mean over the images, or that of the third power, which few images with the same
large values rule; and the share of the pixels where it is largest: all for a pattern that covers the image, few for a
patch."""
_ROUNDS = 8
_APART = 4.0
"""Deviations from the median beyond which the images lie from whose mean the division begins."""
_SMALLEST = 10
_SEPARATION = 8.0
"""Distance of the two sides, in standard deviations of the larger, from which a direction counts: words without poison
reached 5.5 (docs/methods.md)."""
_READ = 4096
"""Images that are read at a time."""


@dataclass(frozen=True)
class WordPattern:
    """Pairs with a common word whose pixels stand apart.

    Attributes:
        word: The word.
        rows: All pairs whose captions have it and whose images can be read, shape [N].
        membership: How these divide. Probabilities are positions between the means of the two sides.
        separation: Distance of the two sides, on images that the direction was not made from.
    """

    word: str
    rows: Rows
    membership: Membership
    separation: float

    @property
    def pairs(self) -> Rows:
        """The pairs that more likely than not have the pattern."""
        return self.rows[self.membership.probabilities >= 0.5]


@dataclass(frozen=True)
class _Direction:
    """How images are projected: shape [3 H W] each.

    Attributes:
        centre: Mean detail of images of the set.
        spread: Standard deviation of the detail of images with the word.
        axis: The direction, of length 1.
    """

    centre: Floats
    spread: Floats
    axis: Floats

    def of(self, images: NDArray[np.uint8]) -> Floats:
        """Projections of images, shape [N]."""
        found: Floats = _units(_detail(images) - self.centre, self.spread) @ self.axis
        return found


def find_patterns(captions: Captions, read: Reader, *, most: int, seed: int) -> list[WordPattern]:
    """Search the images of the most common words.

    The images are looked for in as few parts of the set as have enough of them; only where a pattern is found, all
    images with its word are read.

    Args:
        captions: Captions of all pairs.
        read: Reads images.
        most: Number of words, the most common ones that no more than half of the captions have.
        seed: Of the order in which parts are looked through.
    """
    counts: Counter[str] = Counter()
    total = 0
    for _, each in captions.all():
        total += len(each)
        for text in each:
            counts.update(words(text))
    chosen = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
              if _FEWEST <= count <= _MOST * total][:most]  # fmt: skip
    sample = captions.sample(chosen, _SAMPLE, seed=seed)
    if not chosen or not read(sample[chosen[0]][:1]):
        return []  # embeddings without images
    centre = _detail(_images(read, np.unique(np.concatenate([rows[:_FEWEST] for rows in sample.values()])))).mean(0)
    found = []
    for word in chosen:
        images = _images(read, sample[word])
        direction = _search(images, centre) if len(images) >= _FEWEST else None
        if direction is not None:
            found.append(_everywhere(word, *direction, captions, read))
    return found


def _images(read: Reader, rows: Rows) -> NDArray[np.uint8]:
    """Reduced images of pairs, without those that cannot be read."""
    images = read(np.sort(rows))
    return _reduced(np.stack([images[row] for row in sorted(images)])) if images else np.zeros((0, 3, 1, 1), np.uint8)


def _everywhere(word: str, direction: _Direction, separation: float, captions: Captions, read: Reader) -> WordPattern:
    rows, values = [], []
    everything = captions.having(word)
    for start in range(0, len(everything), _READ):
        images = read(everything[start : start + _READ])
        if images:
            rows += sorted(images)
            values.append(direction.of(_reduced(np.stack([images[row] for row in sorted(images)]))))
    divided = _divided(np.concatenate(values).astype(np.float64))
    return WordPattern(word, np.array(rows, np.int64), divided, separation)


def _search(images: NDArray[np.uint8], centre: Floats) -> tuple[_Direction, float] | None:
    """A direction along which a few images stand apart, and how far, on images that it was not made from."""
    values = _detail(images) - centre
    spread: Floats = values.std(0) + 1
    units = _units(values, spread)
    total = units.sum(0)
    moments = {1: total, 3: (units * units * units).sum(0)}
    best: tuple[_Direction, float] | None = None
    for power, share in _STARTS:
        axis = moments[power]
        axis = np.where(np.abs(axis) >= np.quantile(np.abs(axis), 1 - share), axis, 0)
        for _ in range(_ROUNDS):
            members = _apart(units @ _unit(axis))
            count = int(members.sum())
            if count < _SMALLEST:
                break
            inside = units[members].sum(0)
            axis = inside / count - (total - inside) / (len(units) - count)
        else:
            separation = _held_out(units, members)
            if separation >= _SEPARATION and (best is None or separation > best[1]):
                best = _Direction(centre, spread, _unit(axis)), separation
    return best


def _held_out(units: Floats, members: NDArray[np.bool_]) -> float:
    """How far members lie from the others along the direction that half of the images give, on the other half."""
    half = np.random.default_rng(0).random(len(units)) < 0.5
    sides = [units[members & half], units[~members & half], units[members & ~half], units[~members & ~half]]
    if min(len(side) for side in sides) < 2:
        return 0.0
    axis = _unit(sides[0].mean(0) - sides[1].mean(0))
    return _separation(sides[2] @ axis, sides[3] @ axis)


def _separation(inside: NDArray[np.floating], outside: NDArray[np.floating]) -> float:
    return float((inside.mean() - outside.mean()) / max(float(outside.std()), 1e-9))


def _apart(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """The values nearer to the mean of those far above the median than to the mean of the rest."""
    above = values - np.median(values)
    members: NDArray[np.bool_] = above > _APART * 1.4826 * max(float(np.median(np.abs(above))), 1e-9)
    for _ in range(_ROUNDS):
        if not members.any() or members.all():
            break
        members = values > (values[members].mean() + values[~members].mean()) / 2
    return members


def _divided(values: NDArray[np.float64]) -> Membership:
    """How all images with the word divide; the interval is that of a count."""
    members = _apart(values)
    count = int(members.sum())
    if not 0 < count < len(values):
        return Membership(np.zeros(len(values)), 0, 0, 0, 0.0)
    inside, outside = values[members], values[~members]
    probabilities = np.clip((values - outside.mean()) / (inside.mean() - outside.mean()), 0, 1)
    margin = 1.96 * np.sqrt(count * (1 - count / len(values)))
    separation = _separation(inside, outside)
    return Membership(probabilities, count, int(count - margin), int(np.ceil(count + margin)), separation)


def _units(values: Floats, spread: Floats) -> Floats:
    """Rough pictures must not count more than smooth ones: every row gets length 1."""
    scaled = values / spread
    scaled /= np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-9)
    return scaled


def _unit(axis: Floats) -> Floats:
    unit: Floats = axis / max(float(np.linalg.norm(axis)), 1e-9)
    return unit


def _detail(images: NDArray[np.uint8]) -> Floats:
    return detail(images).reshape(len(images), -1)


def _reduced(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    step = max(1, min(images.shape[2:]) // _SIDE)
    if step == 1:
        return images
    height, width = (size // step for size in images.shape[2:])
    parts = images[:, :, : height * step, : width * step].reshape(len(images), 3, height, step, width, step)
    reduced: NDArray[np.uint8] = np.rint(parts.mean((3, 5), dtype=np.float32)).astype(np.uint8)
    return reduced
