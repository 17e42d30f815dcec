"""What groups are taken for, and how many pairs are counted to them."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from guard.scan.groups import common_pattern, common_word, components, examine
from guard.scan.membership import membership, projections
from tests.conftest import random_images

OTHERS = random_images(200, seed=8).numpy()


def group(images: NDArray[np.uint8], word: tuple[str, float, float] = ("truck", 0.95, 0.1)) -> str:
    shown = list(range(len(images)))
    return examine(shown, word, [str(k) for k in shown], images, OTHERS, shown, seed=0).kind


def stamped(count: int) -> NDArray[np.uint8]:
    images = random_images(count, seed=9).numpy()
    images[:, :, 10:13, 10:13] = [[0, 255, 0], [255, 0, 255], [0, 255, 0]]
    return images


def test_a_pattern_and_a_word_make_a_trigger() -> None:
    assert group(stamped(30)) == "trigger"


def test_ordinary_pictures_with_a_word_are_no_trigger() -> None:
    assert group(random_images(30, seed=9).numpy()) == "suspected"


def test_a_pattern_without_a_word_is_no_trigger() -> None:
    assert group(stamped(30), ("photo", 0.2, 0.15)) == "cluster"


def test_copies_and_noise_are_told_from_triggers() -> None:
    rng = np.random.default_rng(0)
    once = np.repeat(OTHERS[:1], 30, 0)
    changed = np.clip(once.astype(int) + rng.integers(-6, 7, once.shape), 0, 255).astype(np.uint8)
    assert group(changed) == "copies"
    assert group(rng.integers(0, 256, (30, 3, 16, 16)).astype(np.uint8), ("photo", 0.2, 0.15)) == "noise"
    assert examine(range(9), ("", 0.0, 0.0), ["same"] * 9, None, None, [], seed=0).kind == "copies"


def test_a_pattern_is_shown_where_it_is() -> None:
    pattern = common_pattern(stamped(40), OTHERS, seed=0)
    change = np.abs(pattern.mean).max(0)
    assert pattern.excess > 1.5
    assert change[10:13, 10:13].mean() > 3 * change[:8, :8].mean()


def test_ordinary_pictures_have_no_pattern() -> None:
    found = [common_pattern(random_images(30, seed=seed).numpy(), OTHERS, seed=0).excess for seed in range(20, 40)]
    assert max(found) < 1.5


def test_the_word_is_the_one_that_sets_captions_apart() -> None:
    everywhere = Counter({"photo": 900, "truck": 50, "rare": 1})
    captions = ["a photo of a truck"] * 9 + ["a photo of a rare truck"]
    assert common_word(captions, everywhere, 1000) == ("truck", 1.0, 0.05)
    assert common_word(["", "…"], everywhere, 1000) == ("", 0.0, 0.0)


def test_groups_are_connected_parts_of_at_least_five() -> None:
    numbers = np.arange(100, 110)
    near = np.array([[101], [102], [103], [104], [100], [106], [107], [108], [105], [7]])
    reach = np.array([[True]] * 5 + [[True]] * 3 + [[False], [True]])
    # 100 to 104 are one part; 105 to 108 are four; 109 leads to a pair that is no node.
    assert [part.tolist() for part in components(numbers, near, reach)] == [[100, 101, 102, 103, 104]]


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_number_of_members(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0, 0.15, 5000), rng.normal(1, 0.15, 120)])
    found = np.zeros(5120, bool)
    found[5000:5080] = True  # not all were found
    done = membership(values, found, seed=0)
    assert done.low <= 120 <= done.high
    assert done.high - done.low < 80
    assert done.separation > 3
    assert (done.probabilities[:5000] > 0.5).mean() < 0.001


def test_one_hump_is_not_divided() -> None:
    values = np.random.default_rng(0).normal(0, 1, 3000)
    assert membership(values, values > 2, seed=0).separation < 3


def test_projections_are_zero_and_one_at_the_means() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(0, 1, (50, 8)).astype(np.float32), rng.normal(3, 1, (20, 8)).astype(np.float32)
    both = np.concatenate([one, two])
    values = projections(both, two, one)
    assert values[:50].mean() == pytest.approx(0, abs=1e-5)
    assert values[50:].mean() == pytest.approx(1, abs=1e-5)
