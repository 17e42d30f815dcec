import numpy as np
import pytest
import torch

from guard.errors import ImageError
from guard.screening import threshold
from guard.screening.calibration import check_bank_size, split, split_without_banks


@pytest.mark.parametrize("seed", [0, 7, 2**35 + 3])
@pytest.mark.parametrize("count", [1, 10, 503])
def test_a_split_is_the_one_that_torch_drew_in_earlier_releases(count: int, seed: int) -> None:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = split(np.arange(count), seed)
    drawn = np.concatenate([parts.banks, parts.threshold, parts.held_out])
    assert drawn.tolist() == order
    assert (len(parts.banks), len(parts.threshold)) == (round(0.4 * count), round(0.4 * count))


def test_a_group_stays_on_one_side_and_sets_the_threshold_with_one_image() -> None:
    groups = np.random.default_rng(0).integers(50, size=400)
    parts = split(groups, seed=3)
    sides = [set(groups[rows].tolist()) for rows in (parts.banks, parts.threshold, parts.held_out)]
    assert [len(side) for side in sides] == [20, 20, 10]
    assert set.union(*sides) == set(range(50))
    assert len(parts.threshold) == 20
    assert len(parts.banks) == np.isin(groups, list(sides[0])).sum()
    firsts = np.unique(groups, return_index=True)[1]
    assert not set(parts.threshold.tolist()) <= set(firsts.tolist())


def test_scores_that_are_alike_within_groups_do_not_raise_the_rate_of_false_alarms() -> None:
    """A threshold from all images of a group flags more than alpha; from one of each it flags as much as alpha."""
    generator, alpha, size = np.random.default_rng(0), 0.02, 8
    rates: dict[str, list[float]] = {"all": [], "one": []}
    for seed in range(400):
        scores = generator.standard_t(3, 250)[:, None] + generator.normal(size=(250, size))
        groups = np.arange(250).repeat(size)
        parts = split(groups, seed)
        requests = generator.standard_t(3, 2000) + generator.normal(size=2000)
        everything = np.flatnonzero(np.isin(groups, groups[parts.threshold]))
        for name, rows in (("all", everything), ("one", parts.threshold)):
            rates[name].append(float((requests > threshold(scores.ravel()[rows], alpha).value).mean()))
    error = float(np.std(rates["one"])) / 20
    assert np.mean(rates["all"]) > alpha + 3 * error
    assert abs(np.mean(rates["one"]) - 2 / 101) < 3 * error


def test_without_banks_two_thirds_set_the_threshold() -> None:
    parts = split_without_banks(90, seed=1)
    assert (len(parts.banks), len(parts.threshold), len(parts.held_out)) == (0, 60, 30)
    assert sorted([*parts.threshold, *parts.held_out]) == list(range(90))


def test_a_bank_needs_more_images_than_k() -> None:
    check_bank_size(4, 3)
    with pytest.raises(ImageError, match=r"k = 4 need more than 4 images, there are 4; give more than 10 images"):
        check_bank_size(4, 4)
