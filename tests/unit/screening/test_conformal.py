import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import UsageError
from guard.screening import Conformal, smallest_alpha, threshold


# Scores on a coarse grid, so that ties are the rule; alpha in thousandths, as people write it.
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 999))
@settings(max_examples=300)
def test_a_score_is_flagged_exactly_if_its_conformal_p_value_is_at_most_alpha(clean: list[int], alpha: int) -> None:
    exact = Fraction(alpha, 1000)
    if exact * (len(clean) + 1) < 1:
        with pytest.raises(UsageError):
            threshold(np.array(clean, np.float32), alpha / 1000)
        return
    chosen = threshold(np.array(clean, np.float32), alpha / 1000)
    assert (chosen.alpha, chosen.size) == (alpha / 1000, len(clean))
    for doubled in range(-1, 27):
        score = doubled / 2
        p_value = Fraction(1 + sum(value >= score for value in clean), len(clean) + 1)
        assert (score > chosen.value) == (p_value <= exact)


@given(st.integers(1, 500))
def test_an_alpha_that_is_too_small_names_how_many_images_are_enough(alpha: int) -> None:
    exact = Fraction(alpha, 1000)
    enough = math.ceil(1 / exact) - 1
    assert threshold(np.zeros(enough), alpha / 1000).size == enough
    if enough > 0:
        with pytest.raises(UsageError, match=f"at least {enough} clean images .* there are {enough - 1};"):
            threshold(np.zeros(enough - 1), alpha / 1000)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        threshold(np.zeros(100), alpha)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_the_false_alarm_rate_holds_on_average_over_splits(alpha: float) -> None:
    splits, size, held = 400, 199, 200
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(splits):
        scores = generator.gamma(2.0, size=size + held)
        rates.append(float((scores[size:] > threshold(scores[:size], alpha).value).mean()))
    # Given the calibration, the rate is Beta(r, n + 1 - r) with r = alpha (n + 1), and the count binomial on top.
    spread = math.sqrt(alpha * (1 - alpha) * (1 / (size + 2) + 1 / held) / splits)
    assert abs(float(np.mean(rates)) - alpha) <= 4 * spread


@given(st.lists(st.integers(0, 12), min_size=3, max_size=60), st.lists(st.integers(-1, 13), min_size=1, max_size=9))
def test_p_values_are_the_share_of_clean_scores_as_high_and_the_request_itself(
    clean: list[int], asked: list[int]
) -> None:
    conformal = Conformal(np.array(clean, np.float32), 0.3)
    expected = [(1 + sum(value >= score for value in clean)) / (len(clean) + 1) for score in asked]
    found = conformal.p_values(np.array(asked, np.float32))
    np.testing.assert_allclose(found, expected)
    limit = threshold(np.array(clean, np.float32), 0.3).value
    assert conformal.flags(found).tolist() == [score > limit for score in asked]


@given(st.integers(4, 400), st.integers(0, 20), st.integers(10, 300))
def test_what_was_left_out_counts_as_clean_as_far_as_something_is_still_flagged(
    size: int, left_out: int, alpha: int
) -> None:
    rate, scores = alpha / 1000, np.arange(float(size))
    if rate * (size + 1) < 1:
        return
    given = np.concatenate([scores, np.full(left_out, np.inf)])
    wanted = threshold(given, rate).value
    found = threshold(scores, rate, left_out)
    assert found.value == min(wanted, size - 1)
    conformal = Conformal(scores, rate, left_out=np.zeros(left_out, np.int64))
    asked = np.arange(-0.5, size + 1)
    assert conformal.flags(conformal.p_values(asked)).tolist() == (asked > found.value).tolist()
    assert bool(conformal.flags(conformal.p_values(np.array([size + 1.0])))[0])


def test_images_that_look_triggered_and_are_clean_do_not_raise_the_rate_of_false_alarms() -> None:
    """The one per cent of clean images with the largest scores are left out of the calibration, as hygiene would."""
    splits, size, alpha, limit = 400, 499, 0.05, 0.99
    generator = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"counted": [], "dropped": []}
    for _ in range(splits):
        scores = generator.random(2 * size)
        kept = scores[:size][scores[:size] <= limit]
        for name, left_out in (("counted", size - len(kept)), ("dropped", 0)):
            rates[name].append(float((scores[size:] > threshold(kept, alpha, left_out).value).mean()))
    spread = math.sqrt(2 * alpha * (1 - alpha) / size / splits)
    assert abs(float(np.mean(rates["counted"])) - alpha) <= 4 * spread
    assert float(np.mean(rates["dropped"])) > alpha + 0.007


def test_the_smallest_alpha_is_supported_and_a_smaller_one_is_not() -> None:
    scores = np.arange(249.0)
    assert Conformal(scores, smallest_alpha(249)).p_values(np.array([999.0])) == pytest.approx(smallest_alpha(249))
    with pytest.raises(UsageError, match=r"an alpha of at least 0.004"):
        Conformal(scores, 0.99 * smallest_alpha(249))


def classes_of_two_kinds(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of class 0 are ten times as wide as those of class 1; classes 2 to 4 are rare."""
    generator = np.random.default_rng(seed)
    classes = generator.choice(5, size, p=[0.45, 0.45, 0.04, 0.03, 0.03])
    return generator.exponential(size=size) * np.where(classes == 0, 10, 1), classes


def test_the_rate_holds_for_each_class_that_has_enough_images_and_for_the_rare_ones_together() -> None:
    alpha, splits, size, asked = 0.05, 300, 400, 400
    rates: dict[str, list[float]] = {"0": [], "1": [], "rare": [], "0 without": []}
    for split in range(splits):
        scores, classes = classes_of_two_kinds(size + asked, split)
        conformal = Conformal(scores[:size], alpha, classes[:size])
        assert set(conformal.own) == {0, 1} | ({2, 3, 4} & set(conformal.own))
        flags = conformal.flags(conformal.p_values(scores[size:], classes[size:]))
        plain = scores[size:] > threshold(scores[:size], alpha).value
        for name, rows in (("0", classes[size:] == 0), ("1", classes[size:] == 1), ("rare", classes[size:] > 1)):
            rates[name].append(float(flags[rows].mean()))
        rates["0 without"].append(float(plain[classes[size:] == 0].mean()))
    means = {name: float(np.mean(values)) for name, values in rates.items()}
    # A class has about 180 scores on each side: the spread of one rate is 0.023, of their mean 0.0013.
    assert abs(means["0"] - alpha) < 0.006
    assert abs(means["1"] - alpha) < 0.006
    assert means["rare"] < alpha + 0.01
    assert means["0 without"] > 1.8 * alpha


def test_rare_classes_that_are_too_few_together_are_compared_with_all() -> None:
    scores, classes = np.arange(100.0), np.array([0] * 95 + [1] * 5)
    conformal = Conformal(scores, 0.02, classes)
    assert conformal.own == (0,)
    found = conformal.p_values(np.array([94.5, 94.5]), np.array([0, 1]))
    np.testing.assert_allclose(found, [1 / 96, 6 / 101])
