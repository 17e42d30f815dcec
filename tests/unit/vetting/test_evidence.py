import numpy as np
import pytest

from guard.vetting import ClassEvidence, Evidence, judge, outliers


def test_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(0)
    p_values = np.concatenate([outliers(list(rng.normal(0, 1, 10)))[1] for _ in range(2000)])
    for level in (0.01, 0.05, 0.5):
        # Ten dependent values in each of 2,000 draws: three standard errors of 2,000 independent ones is generous.
        assert np.mean(p_values <= level) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 2000))


def test_the_published_trial_is_an_outlier_and_its_twin_is_not() -> None:
    backdoored = np.log([23, 65, 108, 105, 85, 76, 61, 66, 72, 49]) - np.log(
        [116, 71, 115, 118, 102, 74, 59, 71, 87, 48]
    )
    twin = np.log([91, 79, 108, 109, 89, 76, 64, 65, 72, 42]) - np.log([116, 71, 115, 118, 102, 74, 59, 71, 87, 48])
    assert outliers(list(backdoored))[1].argmin() == 0
    assert outliers(list(backdoored))[1].min() * 20 < 0.001
    assert outliers(list(twin))[1].min() * 20 > 0.05


def test_a_tiny_spread_does_not_make_a_tiny_difference_significant() -> None:
    assert outliers([-0.05, *np.linspace(0, 0.001, 9)])[1].min() > 0.05


def test_failed_searches_neither_score_nor_join_the_null() -> None:
    scores, p_values = outliers([None, 0.0, 0.1, -0.1, 0.05, -3.0])
    assert np.isnan(scores[0])
    assert np.isnan(p_values[0])
    assert p_values.size - np.isnan(p_values).sum() == 5


def test_few_classes_give_no_p_value() -> None:
    assert np.isnan(outliers([0.0, 1.0, 2.0, -9.0])[1]).all()


def evidence(
    p_value: float,
    *,
    success: float = 0.9,
    base_success: float | None = 0.0,
    target: int | None = 0,
    family: str = "patch",
) -> Evidence:
    entry = ClassEvidence(
        target=0,
        name="cat",
        reached=True,
        norm=5.0,
        success=success,
        margin=1.0,
        base_norm=50.0,
        base_success=base_success,
        statistic=-2.3,
        score=-9.0,
        p_value=p_value / 20,
    )
    return Evidence("m", family, "px", "s", "n", "base", (entry,), target, p_value, 0, 1, 1.0)


def test_a_significant_trigger_that_works_elsewhere_is_a_backdoor() -> None:
    verdict = judge([evidence(0.5, family="additive"), evidence(0.001)])
    assert (verdict.outcome, verdict.target, verdict.p_value) == ("backdoored", 0, 0.001)
    assert verdict.families == ("additive", "patch")


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([evidence(0.001, success=0.3)], "only 30% of held-out"),
        ([evidence(0.001, base_success=0.8)], "natural feature"),
        ([evidence(0.03)], "stands out"),
        ([evidence(1.0, target=None)], "no p-value"),
        ([evidence(0.9), evidence(1.0, target=None, family="additive")], "no p-value for additive"),
    ],
)
def test_doubt_is_inconclusive_and_says_why(items: list[Evidence], reason: str) -> None:
    verdict = judge(items)
    assert verdict.outcome == "inconclusive"
    assert verdict.target is None
    assert reason in " ".join(verdict.reasons)


def test_nothing_standing_out_is_no_evidence_of_the_families_tested() -> None:
    verdict = judge([evidence(0.4), evidence(0.9, family="additive")])
    assert verdict.outcome == "no evidence"
    assert "patch, additive" in verdict.reasons[0]


def test_a_class_that_no_family_could_compare_forbids_no_evidence() -> None:
    from dataclasses import replace

    compared, lost = evidence(0.4), evidence(0.4).classes[0]
    lost = replace(lost, target=1, name="dog", reached=False, statistic=None, score=None, p_value=None)
    verdict = judge([replace(compared, classes=(*compared.classes, lost))])
    assert verdict.outcome == "inconclusive"
    assert "no search converged for 1 classes: 'dog'" in verdict.reasons[0]


def test_an_invalid_trigger_does_not_hide_a_valid_one_of_another_family() -> None:
    verdict = judge([evidence(0.0001, success=0.1), evidence(0.002, family="additive")])
    assert verdict.outcome == "backdoored"
