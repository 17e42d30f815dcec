import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import beta, mannwhitneyu

from guard.evaluation import Rate, auroc


def test_the_interval_of_a_rate_is_clopper_and_pearsons() -> None:
    rate = Rate.of(3, 20)
    assert rate.value == 0.15
    assert rate.low == pytest.approx(beta.ppf(0.025, 3, 18))
    assert rate.high == pytest.approx(beta.ppf(0.975, 4, 17))
    assert (Rate.of(0, 20).low, Rate.of(20, 20).high) == (0, 1)


def test_a_rate_shows_its_counts_and_interval() -> None:
    assert Rate.of(19, 20).brief == "95.0% (19/20; 75.1%–99.9%)"
    assert str(Rate.of(19, 20)).strip() == "95.0%  (19/20; 95 % interval 75.1% to 99.9%)"


def test_auroc_by_hand() -> None:
    # Pairs: 2 beats 1 and 0; 1 ties with 1 and beats 0.
    area = auroc([2.0, 1.0], [1.0, 0.0])
    assert area.value == 3.5 / 4
    assert (area.positives, area.negatives) == (2, 2)


def test_auroc_is_mann_and_whitneys_statistic() -> None:
    generator = np.random.default_rng(0)
    high, low = generator.integers(0, 12, 40) + 2, generator.integers(0, 12, 70)
    expected = mannwhitneyu(high, low).statistic / (40 * 70)
    assert auroc(high.tolist(), low.tolist()).value == pytest.approx(expected)


@pytest.mark.parametrize(("wins", "positives", "negatives"), [(1.0, 10, 10), (0.8, 20, 5), (0.5, 8, 30)])
def test_the_limits_solve_newcombes_equation(wins: float, positives: int, negatives: int) -> None:
    count = round(wins * positives)
    area = auroc([1.0] * count + [-1.0] * (positives - count), [0.0] * negatives)
    assert area.value == pytest.approx(wins)

    def gap(theta: float) -> float:
        size = (positives + negatives) / 2 - 1
        hanley = theta / (2 - theta) - theta**2, 2 * theta**2 / (1 + theta) - theta**2
        variance = (theta * (1 - theta) + size * sum(hanley)) / (positives * negatives)
        return abs(area.value - theta) - 1.959964 * math.sqrt(max(variance, 0))

    assert area.low == pytest.approx(brentq(gap, 1e-9, area.value - 1e-9), abs=1e-5)
    if wins < 1:
        assert area.high == pytest.approx(brentq(gap, area.value + 1e-9, 1 - 1e-9), abs=1e-5)
    else:
        assert area.high == 1


def test_perfect_separation_of_few_models_is_not_certain() -> None:
    assert auroc([1.0] * 5, [0.0] * 5).low < 0.8 < auroc([1.0] * 100, [0.0] * 100).low


@pytest.mark.parametrize(("positive", "negative"), [([], [0.0]), ([0.0], []), ([math.nan], [0.0])])
def test_what_cannot_be_ranked_is_refused(positive: list[float], negative: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scores of both kinds|not a number"):
        auroc(positive, negative)
