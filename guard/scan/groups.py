"""Groups of suspicious pairs, and what their images and captions have in common."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats, Rows

GroupKind = Literal["trigger", "suspected", "copies", "noise", "cluster"]
SMALLEST = 5
"""Pairs in the smallest group."""
SHOWN = 64
"""Images of a group that are looked at."""
_NULLS, _PIXELS = 999, 8192
_EXCESS = 1.5
"""A pattern counts from this excess on. Dozens of groups are tested, which the p-value of 999 draws cannot make up
for."""
_SAME_PICTURE, _DIVERSE = 0.9, 0.6
_ROUGH = 0.9
"""Pictures are noise from this roughness on: that of noise is 1.4, that of photographs of 32 pixels about 0.3."""
_COMMON = 0.5
"""Share of a group's captions that must have a word in common."""
_LIFT = 3.0
"""How much more frequent that word must be than in the whole set."""
_GRID = 16
_WORD = re.compile(r"\w+")
_STOP = frozenset(
    ("a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "with", "is", "are", "for", "from", "by", "this",
     "that", "it", "its", "my", "your", "one")
)  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """What the images of a group have in common, at one place.

    Attributes:
        strength: Largest mean of the fine detail over the group, in standard errors.
        excess: The strength relative to the largest of 999 equally large groups of other images with the same word.
        p_value: Share of these groups, and itself, whose strength is as large.
        mean: Mean detail of the group without that of other images, shape [3, H, W], in pixel values.
    """

    strength: float
    excess: float
    p_value: float
    mean: Floats


@dataclass(frozen=True)
class Group:
    """Suspicious pairs that lie close together.

    Attributes:
        kind: `trigger`: different pictures, with a common word in their captions and a common pattern. `suspected`: the
            same without a pattern that shows, but set apart from all other pairs with the word. `copies`: one picture
            many times, such as a placeholder. `noise`: pictures without structure. `cluster`: anything else.
        pairs: Numbers of the pairs in the set, the most suspicious first.
        word: The word that sets its captions apart; empty if there is none.
        share: Share of its captions that have the word.
        elsewhere: Share of all captions that have it.
        copies: Share of its images that occur in it more than once, byte by byte.
        similarity: Median correlation between its images.
        pattern: What its images have in common; None if they were not looked at.
        shown: The pairs whose images were looked at.
        count: Estimated number of pairs that belong to it.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    kind: GroupKind
    pairs: tuple[int, ...]
    word: str
    share: float
    elsewhere: float
    copies: float
    similarity: float | None
    pattern: Pattern | None
    shown: tuple[int, ...]
    count: int
    low: int
    high: int


def components(numbers: Rows, neighbours: Rows, reach: NDArray[np.bool_]) -> list[Rows]:
    """Connected parts of a graph, the largest first.

    Args:
        numbers: The pairs that are its nodes, shape [M].
        neighbours: Other pairs for each, shape [M, k].
        reach: Whether there is an edge to each of these, shape [M, k]; one to what is no node does not count.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    place = {int(number): row for row, number in enumerate(numbers)}
    edges = [
        (row, place[int(other)])
        for row, (others, reached) in enumerate(zip(neighbours, reach, strict=True))
        for other in others[reached]
        if int(other) in place
    ]
    start, end = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), (start, end)), shape=(len(numbers), len(numbers)))
    count, labels = connected_components(graph, directed=False)
    parts = [numbers[labels == label] for label in range(count)] if count < len(numbers) else []
    return sorted((part for part in parts if len(part) >= SMALLEST), key=lambda part: (-len(part), int(part[0])))


def words(caption: str) -> set[str]:
    """The words of a caption that can be a target."""
    return {word for word in _WORD.findall(caption.casefold()) if word not in _STOP}


def common_word(captions: Sequence[str], everywhere: Mapping[str, int], total: int) -> tuple[str, float, float]:
    """The word that sets captions apart, with its share among them and among all captions.

    Args:
        captions: Captions of a group.
        everywhere: In how many captions of the whole set each word occurs.
        total: Number of captions of the whole set.
    """
    counts = Counter(word for caption in captions for word in words(caption))

    def weight(word: str) -> float:
        share, base = counts[word] / len(captions), max(1, everywhere.get(word, 0)) / total
        return share * float(np.log(share / base))

    best = max(sorted(counts), key=weight, default="")
    if not best:
        return "", 0.0, 0.0
    return best, counts[best] / len(captions), everywhere.get(best, 0) / total


def examine(
    pairs: Sequence[int],
    common: tuple[str, float, float],
    digests: Sequence[str],
    images: NDArray[np.uint8] | None,
    others: NDArray[np.uint8] | None,
    shown: Sequence[int],
    *,
    seed: int,
) -> Group:
    """Say what a group is.

    Args:
        pairs: Its pairs.
        common: The word that sets their captions apart (`common_word`).
        digests: Digests of their images.
        images: Images of some of its pairs, shape [n, 3, H, W]; None where there are none.
        others: Images of other pairs whose captions have the word, shape [m, 3, H, W].
        shown: The pairs whose images these are.
        seed: Of the groups that the pattern is compared with.
    """
    word, share, elsewhere = common
    counts = Counter(digests)
    copies = sum(count for count in counts.values() if count > 1) / len(digests) if any(digests) else 0.0
    similarity = pattern = None
    rough = False
    if images is not None and others is not None and len(images) >= SMALLEST and len(others) >= SMALLEST:
        similarity = _similarity(images)
        pattern = common_pattern(images, others, seed=seed)
        rough = _roughness(images) > _ROUGH
    targeted = share >= _COMMON and share >= _LIFT * elsewhere
    diverse = similarity is None or similarity < _DIVERSE
    kind: GroupKind = "cluster"
    if copies >= 0.5 or (similarity is not None and similarity >= _SAME_PICTURE):
        kind = "copies"
    elif targeted and diverse and pattern is not None and pattern.excess >= _EXCESS:
        kind = "trigger"
    elif rough:
        kind = "noise"
    elif targeted and diverse:
        kind = "suspected"
    size = len(pairs)
    return Group(
        kind, tuple(pairs), word, share, elsewhere, copies, similarity, pattern, tuple(shown), size, size, size
    )


def common_pattern(images: NDArray[np.uint8], others: NDArray[np.uint8], *, seed: int) -> Pattern:
    """What a group of images has in common at one place, compared with other images.

    Coarse features of ordinary images that belong together coincide, such as the sky above; fine detail does not stay
    at one place, unless it was put there. So the mean of the detail (a pixel without the mean of the 3 × 3 around it)
    is measured in standard errors, and its maximum compared with that of as many other images, drawn 999 times.

    Args:
        images: Shape [n, 3, H, W].
        others: Shape [m, 3, H, W].
        seed: Of the draws.
    """
    values, reference = detail(images), detail(others)
    centre, spread = reference.mean(0), reference.std(0) + 1.0
    size = min(len(values), len(reference))
    generator = np.random.default_rng(seed)

    def strength(part: Floats) -> float:
        return float(np.abs((part.mean(0) - centre) / spread).max() * np.sqrt(len(part)))

    own = strength(values[:size])
    chosen = np.zeros((_NULLS, len(reference)), np.float32)
    for row in chosen:
        row[generator.choice(len(reference), size, replace=True)] += 1
    flat = ((reference - centre) / spread).reshape(len(reference), -1)
    nulls = np.zeros(_NULLS, np.float32)
    for start in range(0, flat.shape[1], _PIXELS):  # pixels of large images would not fit into memory at once
        np.maximum(nulls, np.abs(chosen @ flat[:, start : start + _PIXELS]).max(1), out=nulls)
    nulls *= np.sqrt(size) / size
    p_value = (1 + int((nulls >= own).sum())) / (_NULLS + 1)
    mean: Floats = images.astype(np.float32).mean(0) - others.astype(np.float32).mean(0)
    return Pattern(own, own / max(float(nulls.max()), 1e-6), p_value, mean)


def detail(images: NDArray[np.uint8]) -> Floats:
    """Pixels without the mean of the 3 × 3 around them, shape [N, 3, H, W]."""
    values = images.astype(np.float32)
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)), "edge")
    height, width = values.shape[-2:]
    around = sum(padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3))
    found: Floats = values - np.asarray(around, np.float32) / np.float32(9)
    return found


def _similarity(images: NDArray[np.uint8]) -> float:
    """Median correlation between pairs of images, at 16 × 16."""
    step = max(1, images.shape[-1] // _GRID)
    small = images.astype(np.float32).mean(1)[:, : step * _GRID, : step * _GRID]
    count, height, width = small.shape
    small = small.reshape(count, height // step, step, width // step, step).mean((2, 4)).reshape(count, -1)
    small -= small.mean(1, keepdims=True)
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    return float(np.median((small @ small.T)[np.triu_indices(count, 1)]))


def _roughness(images: NDArray[np.uint8]) -> float:
    """How far neighbouring pixels differ, relative to how far all pixels do: median over images, of medians."""
    grey = images.astype(np.float32).mean(1)
    across = np.median(np.abs(np.diff(grey, axis=2)), axis=(1, 2))
    spread = np.median(np.abs(grey - np.median(grey, axis=(1, 2), keepdims=True)), axis=(1, 2))
    return float(np.median(across / np.maximum(spread, 1.0)))


def count_words(captions: Iterable[str], wanted: set[str], counts: Counter[str]) -> None:
    """Add in how many captions each of some words occurs."""
    for caption in captions:
        counts.update(words(caption) & wanted)
