"""Captions of a set, read part by part, and the reader of its images."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from guard._types import Rows
from guard.scan.groups import words

Reader = Callable[[Rows], Mapping[int, NDArray[np.uint8]]]
"""Reads images by the numbers of their pairs; those that cannot be read are missing in its result."""


class Captions:
    """Captions and digests of all pairs, read part by part.

    Args:
        parts: For each part a function that reads captions, and one that reads digests.
        sizes: Number of pairs in each part.
    """

    def __init__(
        self, parts: Sequence[tuple[Callable[[], Sequence[str]], Callable[[], Sequence[str]]]], sizes: Sequence[int]
    ) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *sizes])

    def of(self, rows: Rows) -> tuple[dict[int, str], dict[int, str]]:
        """Captions and digests of some pairs."""
        captions, digests = dict[int, str](), dict[int, str]()
        for number, (caption, digest) in enumerate(self._parts):
            start, stop = self._starts[number], self._starts[number + 1]
            inside = rows[(rows >= start) & (rows < stop)]
            if len(inside):
                texts, sums = caption(), digest()
                captions |= {int(row): texts[row - start] for row in inside}
                digests |= {int(row): sums[row - start] for row in inside}
        return captions, digests

    def all(self) -> Iterable[tuple[int, Sequence[str]]]:
        """The number of the first pair of each part, and its captions."""
        return ((int(start), caption()) for start, (caption, _) in zip(self._starts, self._parts, strict=False))

    def having(self, word: str) -> Rows:
        """The pairs whose captions have a word."""
        return np.array(
            [
                start + place
                for start, each in self.all()
                for place, text in enumerate(each)
                if word in text.casefold() and word in words(text)
            ],
            np.int64,
        )

    def sample(self, wanted: Sequence[str], count: int, *, seed: int) -> dict[str, Rows]:
        """Pairs whose captions have each of some words, at random from as few parts as have so many of all words."""
        generator = np.random.default_rng((seed, 3))
        found: dict[str, list[int]] = {word: [] for word in wanted}
        for number in generator.permutation(len(self._parts)).tolist():
            if all(len(rows) >= count for rows in found.values()):
                break
            start = int(self._starts[number])
            for place, text in enumerate(self._parts[number][0]()):
                for word in words(text) & found.keys():
                    found[word].append(start + place)
        return {word: generator.permutation(np.array(rows, np.int64))[:count] for word, rows in found.items()}
