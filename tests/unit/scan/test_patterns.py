"""Triggers that are found by the pixels of pairs with a word, whatever their embeddings."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from guard.scan.captions import Captions
from guard.scan.fine import add_patterns
from guard.scan.patterns import find_patterns
from tests.conftest import random_images

COUNT, POISONED, WORDS = 720, 20, ("cat", "dog", "frog", "bird", "deer", "ship")
NOISE = np.random.default_rng(0).normal(0, 8, (COUNT, 3, 16, 16))
IMAGES = (random_images(COUNT, seed=8).numpy() + NOISE).clip(0, 255).astype(np.uint8)
TEXTS = [f"a photo of a {WORDS[row % 6]}" for row in range(COUNT)]


class Reader:
    """Reads images from memory, and counts them."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images, self.count = images, 0

    def __call__(self, rows: NDArray[np.int64]) -> Mapping[int, NDArray[np.uint8]]:
        self.count += len(rows)
        return {int(row): self._images[row] for row in rows}


def captions(texts: list[str]) -> Captions:
    halves = [texts[:300], texts[300:]]
    parts = [(lambda part=part: part, lambda part=part: [""] * len(part)) for part in halves]
    return Captions(parts, [len(part) for part in halves])


def poisoned(kind: str) -> tuple[NDArray[np.uint8], Captions]:
    """Twenty pairs of the set get a trigger and the word of another class."""
    images, texts = IMAGES.astype(np.float32), list(TEXTS)
    rows = np.arange(1, 6 * POISONED, 6)
    if kind == "patch":
        images[rows, :, 10:13, 10:13] = np.array([[0, 255, 0], [255, 0, 255], [0, 255, 0]])
    else:
        images[rows] += 12 * np.where(np.arange(16) % 2, 1, -1)
    for row in rows:
        texts[row] = "a photo of a cat"
    return images.clip(0, 255).astype(np.uint8), captions(texts)


@pytest.mark.parametrize(("kind", "scale"), [("patch", 1), ("stripes", 1), ("patch", 6)])
def test_a_pattern_is_found_without_embeddings_and_counted(kind: str, scale: int) -> None:
    images, texts = poisoned(kind)
    images = images.repeat(scale, 2).repeat(scale, 3)
    if scale > 1:
        images = (images + np.random.default_rng(1).normal(0, 16, images.shape)).clip(0, 255).astype(np.uint8)
    (found,) = find_patterns(texts, Reader(images), most=8, seed=0)
    assert (found.word, found.pairs.tolist()) == ("cat", list(range(1, 6 * POISONED, 6)))
    assert found.membership.low < POISONED < found.membership.high
    probabilities: dict[int, float] = {}
    (group,) = add_patterns([], probabilities, [found], np.zeros(COUNT), texts, Reader(images), seed=0)
    assert (group.kind, group.count, len(group.pairs)) == ("trigger", POISONED, POISONED)
    # What was found by its embeddings too is one group, not two.
    part = [replace(group, pairs=(1, 7, 5), count=3)]
    (united,) = add_patterns(part, probabilities, [found], np.zeros(COUNT), texts, Reader(images), seed=0)
    assert set(united.pairs) == {*found.pairs.tolist(), 5}


def test_ordinary_pictures_have_none() -> None:
    assert find_patterns(captions(TEXTS), Reader(IMAGES), most=8, seed=0) == []


def test_few_words_are_read_and_embeddings_have_no_images() -> None:
    reader = Reader(IMAGES)
    find_patterns(captions(TEXTS), reader, most=1, seed=0)
    assert reader.count < COUNT
    assert find_patterns(captions(TEXTS), lambda _: {}, most=8, seed=0) == []
