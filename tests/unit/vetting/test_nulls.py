import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, t

from guard.vetting import Prior, nulls, outliers
from guard.vetting.nulls import MAX_DEGREES, NO_PRIOR, Largest, estimate, joined, pooled

PRIOR = Prior(variance=0.04, degrees=6.0, models=30)
VALUES = [0.1, -0.2, 0.0, 0.3, -0.1, 2.0]
LARGEST = Largest(mean=-1.0, deviation=0.5, models=40)


def simulated(models: int, known: Prior, seed: int = 0) -> NDArray[np.float64]:
    """Ten ordinary classes each, spread as the prior says."""
    rng = np.random.default_rng(seed)
    variances = known.degrees * known.variance / rng.chisquare(known.degrees, models)
    return rng.normal(5, np.sqrt(variances)[:, None], (models, 10))


def test_a_moderated_t_by_hand() -> None:
    scores, p_values = outliers(VALUES, PRIOR)
    others = np.array(VALUES[:5])
    pooled = (6 * 0.04 + 4 * others.var(ddof=1)) / (6 + 4)
    assert scores[5] == pytest.approx((2.0 - others.mean()) / np.sqrt(pooled * (1 + 1 / 5)))
    assert p_values[5] == pytest.approx(t.sf(scores[5], df=10))


def test_a_prior_never_narrows_the_spread_among_the_classes() -> None:
    """It only makes it surer: a model that spreads more widely than clean ones did is judged by its own spread."""
    scores, p_values = outliers(VALUES, Prior(1e-6, 6.0, 30))
    assert scores[5] == pytest.approx(outliers(VALUES)[0][5])
    assert p_values[5] == pytest.approx(t.sf(scores[5], df=10))


def test_a_prior_counts_up_to_a_limit() -> None:
    limited, unlimited = (outliers(VALUES, Prior(0.04, degrees, 30)) for degrees in (MAX_DEGREES, 1e3))
    np.testing.assert_array_equal(limited, unlimited)
    assert unlimited[1][5] == pytest.approx(t.sf(unlimited[0][5], df=MAX_DEGREES + 4))


def test_without_a_prior_it_is_the_plain_prediction_t() -> None:
    scores, p_values = outliers(VALUES)
    others = np.array(VALUES[:5])
    assert scores[5] == pytest.approx((2.0 - others.mean()) / (others.std(ddof=1) * np.sqrt(6 / 5)))
    assert p_values[5] == pytest.approx(t.sf(scores[5], df=4))
    np.testing.assert_array_equal(outliers(VALUES, Prior(123.0, 0.0, 0))[1], p_values)


def test_an_outlier_does_not_widen_its_own_null_nor_count_from_below() -> None:
    p_values = outliers([0.0, 0.1, -0.1, 0.05, 1e6])[1]
    assert p_values[4] < 1e-8
    assert outliers([0.0, 0.1, -0.1, 0.05, -1e6])[1][4] > 1 - 1e-8


def test_a_prior_makes_a_clear_outlier_of_few_classes_more_certain() -> None:
    assert outliers(VALUES, PRIOR)[1][5] < outliers(VALUES)[1][5] / 10


def test_a_tiny_spread_does_not_make_a_tiny_difference_significant() -> None:
    close = [0.05, *np.linspace(0, 0.001, 9)]
    assert outliers(close)[1][0] < 1e-6
    assert outliers(close, PRIOR)[1][0] > 0.3
    assert np.isfinite(outliers([0.0] * 6)[1]).all()


def test_a_class_without_a_statistic_neither_scores_nor_joins_the_null() -> None:
    scores, p_values = outliers([None, *VALUES, float("nan")])
    assert np.isnan([scores[0], p_values[0], scores[-1], p_values[-1]]).all()
    np.testing.assert_array_equal(p_values[1:-1], outliers(VALUES)[1])


def test_only_the_reference_makes_up_the_null() -> None:
    far = [50.0, -50.0]
    scores, p_values = outliers([*VALUES, *far], PRIOR, [True] * 5 + [False] * 3)
    np.testing.assert_allclose(p_values[:6], outliers(VALUES, PRIOR, [True] * 5 + [False])[1])
    assert scores[6] > scores[5] > 0 > scores[7]  # the others are judged by it all the same


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_give_no_p_value(classes: int) -> None:
    assert np.isnan(outliers([0.0, 1.0, 2.0, 9.0][:classes], PRIOR)[1]).all()


def test_five_classes_give_one() -> None:
    assert np.isfinite(outliers(VALUES[:5])[1]).all()
    assert np.isnan(outliers(VALUES[:5], PRIOR, [True] * 4 + [False])[1][:4]).all()  # three others in the reference


@pytest.mark.parametrize("known", [PRIOR, NO_PRIOR], ids=["moderated", "plain"])
def test_false_alarms_are_as_rare_as_they_are_said_to_be(known: Prior) -> None:
    statistics = simulated(1000, PRIOR)
    p_values = np.stack([outliers(list(row), known)[1] for row in statistics])
    corrected = 10 * p_values.min(1)
    for level in (0.01, 0.05):
        # At most the level, but for what chance does to a thousand models once in a thousand times.
        assert (corrected <= level).sum() <= binom.ppf(0.999, 1000, level)
        # And no rarer than it must be: the correction costs little.
        assert (corrected <= level).sum() >= binom.ppf(0.001, 1000, 0.7 * level)
    assert np.mean(p_values <= 0.5) == pytest.approx(0.5, abs=0.05)


def test_the_prior_of_simulated_models_is_recovered() -> None:
    known = Prior(variance=0.3, degrees=8.0, models=3000)
    found = estimate(list(simulated(3000, known).var(1, ddof=1)), [9] * 3000)
    assert found.variance == pytest.approx(known.variance, rel=0.05)
    assert found.degrees == pytest.approx(known.degrees, rel=0.15)
    assert found.models == 3000


def test_models_that_differ_no_more_than_by_chance_count_in_full() -> None:
    rng = np.random.default_rng(0)
    found = estimate(list(rng.normal(0, 2, (50, 10)).var(1, ddof=1)), [9] * 50)
    assert found.degrees > 50
    assert found.variance == pytest.approx(4, rel=0.15)


def test_two_targets_do_not_hide_each_other() -> None:
    """Leads of a backdoored model of the zoo `small`: classes 6 and 7 are the attacker's."""
    leads = [0.24, -0.06, -0.12, -0.03, 0.15, -0.23, 1.56, 1.65, 0.11, -0.05]
    scores, p_values = outliers(leads)
    assert sorted(np.argsort(p_values)[:2]) == [6, 7]
    assert 10 * p_values[[6, 7]].max() < 0.001
    assert 10 * np.delete(p_values, [6, 7]).min() > 1
    assert scores[[6, 7]].min() > 5


def test_three_targets_do_not_hide_each_other() -> None:
    leads = np.array([0.24, -0.06, -0.12, -0.03, 0.15, -0.23, 0.02, 0.18, 0.11, -0.05])
    leads[:3] = [1.65, 1.56, 1.6]
    p_values = outliers(leads.tolist())[1]
    assert 10 * p_values[:3].max() < 0.02
    assert 10 * p_values[3:].min() > 1


@pytest.mark.parametrize("classes", [10, 13])
def test_looking_for_several_keeps_the_level(classes: int) -> None:
    rng = np.random.default_rng(1)
    alarms = [classes * outliers(rng.normal(size=classes).tolist())[1].min() <= 0.05 for _ in range(1500)]
    assert np.mean(alarms) < 0.065


def test_models_that_have_nothing_in_common_hardly_count() -> None:
    assert estimate([1e-6, 1e-3, 1.0, 1e3, 1e6], [9] * 5).degrees < 0.5


@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["alike", "different"])
def test_two_estimates_join_to_that_of_all_models(spread: float) -> None:
    rng = np.random.default_rng(3)
    scales = np.exp(rng.normal(0, spread, 40))
    variances = [float(rng.normal(0, scale, 10).var(ddof=1)) for scale in scales]
    whole, parts = (
        estimate(variances, [9] * 40),
        [estimate(part, [9] * len(part)) for part in (variances[:25], variances[25:])],
    )
    both = joined(parts[0], parts[1], 9)
    assert both.models == 40
    assert both.variance == pytest.approx(whole.variance)
    assert both.degrees == pytest.approx(whole.degrees)


def test_the_moments_of_two_samples_together() -> None:
    first, second = np.random.default_rng(4).normal(size=(2, 12))
    second = second[:7] + 2
    together = np.concatenate([first, second])
    found = pooled(*((len(each), each.mean(), each.var(ddof=1)) for each in (first, second)))
    assert found == pytest.approx((19, together.mean(), together.var(ddof=1)))


def test_the_largest_class_of_another_model_is_a_prediction_not_a_mean() -> None:
    """Drawn from the same normal distribution, it is beyond a level as often as the level says."""
    rng = np.random.default_rng(0)
    found = [Largest(*_moments(rng.normal(-1, 0.5, 20)), 20).p_value(rng.normal(-1, 0.5)) for _ in range(4000)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.012)


def _moments(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1))


def test_what_the_table_lacks_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"priors": {"base/patch/32": asdict(PRIOR)}, "largest": {"base/probes": asdict(LARGEST)}}
    (tmp_path / "nulls.json").write_text(json.dumps(table))
    monkeypatch.setattr("guard.vetting.nulls.resources.files", lambda _: tmp_path)
    nulls._table.cache_clear()
    try:
        assert nulls.prior("base", "patch", 32) == PRIOR
        assert nulls.largest("base", "probes") == LARGEST
        assert nulls.largest("derived", "probes") is None
        assert nulls.prior("base", "patch", 16) == nulls.prior("derived", "patch", 32) == NO_PRIOR
        assert nulls.prior("base", "patch", 256) == PRIOR, "beyond what was measured, the last counts"
    finally:
        nulls._table.cache_clear()


def test_the_shipped_table_can_be_read() -> None:
    priors, maxima = nulls._table()
    for key, known in priors.items():
        assert known.variance > 0, key
        assert 0 <= known.degrees <= 1e3, key
    for key, item in maxima.items():
        assert item.deviation > 0, key
        assert item.models >= 30, key


def test_a_class_does_not_widen_the_null_of_one_that_it_resembles() -> None:
    values = [*VALUES[:5], 3.0, 9.0]  # the last draws the one before it along
    alike = np.eye(7, dtype=bool)
    alike[5, 6] = alike[6, 5] = True
    apart = outliers(values, alike=dict(enumerate(alike)))[1]
    assert apart[6] < outliers(values)[1][6]
    np.testing.assert_allclose(apart[6], outliers([*VALUES[:5], None, 9.0])[1][6])
    # Where all resemble each other there would be nothing to compare with.
    np.testing.assert_array_equal(
        outliers(values, alike=dict(enumerate(np.ones((7, 7), bool))))[1], outliers(values)[1]
    )
