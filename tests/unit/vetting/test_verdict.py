import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom, cauchy, norm

from guard.vetting import Check, FamilyResult, judge
from guard.vetting.results import PROBES, ReferenceKind
from guard.vetting.verdict import (
    DOUBT,
    MAX_STRENGTH,
    MAX_TRANSFER,
    MIN_SUCCESS,
    NOTICED,
    SHORTCUT,
    SIGNIFICANCE,
    SURE,
    allowed_strength,
    class_results,
    combine,
    is_close,
    is_valid,
    objection,
    suspects,
    suspicion,
)
from tests.conftest import CLASSES
from tests.zoo import check_of, evidence_of


def evidence(p_value: float, *, target: int = 0, family: str = "patch") -> FamilyResult:
    """One class has this p-value, corrected for the six; the others lie where half of all do."""
    p_values = [0.5] * 6
    p_values[target] = p_value / 6
    return evidence_of(p_values, family=family)


def quiet(family: str) -> FamilyResult:
    """A family that has nothing to say: at 0.5 a p-value neither adds to a combination nor takes from it."""
    return evidence_of([0.5] * 6, family=family)


def test_a_significant_class_with_a_trigger_that_works_elsewhere_is_a_backdoor() -> None:
    verdict = judge([quiet("additive"), evidence(0.001)], [check_of(0)])
    assert (verdict.outcome, verdict.target) == ("backdoored", 0)
    assert verdict.p_value == pytest.approx(0.002)
    assert verdict.families == ("additive", "patch")
    assert "stands out (p = 0.002, all 2 families combined; most clearly under patch triggers)" in verdict.reasons[0]
    assert "moves 90% of held-out images" in verdict.reasons[0]


def test_the_trigger_may_be_of_another_family_than_the_evidence() -> None:
    items = [evidence(0.001), quiet("warp")]
    assert judge(items, [check_of(0, success=0.1), check_of(0, family="warp")]).outcome == "backdoored"


def test_a_family_that_sees_nothing_halves_the_evidence_and_one_that_agrees_does_not() -> None:
    item, same = evidence(0.008), evidence(0.008, family="warp")
    alone, diluted, agreed = (judge(items, [check_of(0)]) for items in ([item], [item, quiet("warp")], [item, same]))
    assert [verdict.p_value for verdict in (alone, diluted, agreed)] == pytest.approx([0.008, 0.016, 0.008], rel=1e-3)
    assert [verdict.outcome for verdict in (alone, diluted, agreed)] == ["backdoored", "inconclusive", "backdoored"]


def test_p_values_are_corrected_for_the_classes_that_were_compared() -> None:
    item = evidence_of([0.001, 0.5, None, 0.5, None, 0.5])
    assert judge([item], []).p_value == pytest.approx(0.004)
    assert judge([item, evidence_of([0.001, 0.5, 0.5, 0.5, None, 0.5])], []).p_value == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("items", "checks", "reason"),
    [
        ([evidence(0.001)], [check_of(0, success=0.3)], "moves only 30% of held-out"),
        ([evidence(0.001)], [check_of(0, reference_success=0.8)], "natural feature"),
        ([evidence(0.001)], [], "stands out"),
        ([evidence(0.001)], [check_of(1)], "stands out"),
        ([evidence(0.03)], [check_of(0)], "stands out"),
        ([evidence_of([None] * 6)], [], "no p-value for patch"),
        ([evidence(0.9), evidence_of([None] * 6, family="warp")], [], "no p-value for warp"),
        ([evidence_of([None, *[0.5] * 5])], [], "no family could compare 'cat'"),
    ],
)
def test_doubt_is_inconclusive_and_says_why(items: list[FamilyResult], checks: list[Check], reason: str) -> None:
    verdict = judge(items, checks)
    assert verdict.outcome == "inconclusive"
    assert verdict.target is None
    assert reason in " ".join(verdict.reasons)


@pytest.mark.parametrize(("norm", "outcome"), [(2.0, "backdoored"), (7.2, "inconclusive")])
def test_a_trigger_for_some_classes_must_be_half_as_strong(norm: float, outcome: str) -> None:
    check = replace(check_of(0, norm=norm), sources=("dog", "ship"))
    verdict = judge([evidence(0.01)], [check])
    assert verdict.outcome == outcome
    if outcome == "backdoored":
        assert "90% of held-out images of 'dog', 'ship'" in verdict.reasons[0]
    else:
        assert "a shortcut would need 5.9 at most" in " ".join(verdict.reasons)


def test_nothing_standing_out_is_no_evidence_of_the_families_tested() -> None:
    verdict = judge([evidence(0.4), evidence(0.9, family="warp")], [])
    assert (verdict.outcome, verdict.target, verdict.families) == ("no evidence", None, ("patch", "warp"))
    assert "patch, warp" in verdict.reasons[0]


def test_a_class_that_one_family_compared_is_not_lost() -> None:
    items = [evidence_of([None, *[0.5] * 5]), evidence_of([0.5] * 6, family="warp")]
    assert judge(items, []).outcome == "no evidence"


def test_a_refuted_class_does_not_hide_a_backdoor_behind_it() -> None:
    items = [evidence(1e-6), evidence(0.002, target=2, family="warp")]
    verdict = judge(items, [check_of(0, success=0.1), check_of(2, family="warp")])
    assert (verdict.outcome, verdict.target) == ("backdoored", 2)


def test_a_second_backdoor_is_named() -> None:
    item = evidence_of([1e-6, 1e-5, 1e-4, 0.5, 0.5, 0.5])
    verdict = judge([item], [check_of(0), check_of(1), check_of(2, success=0.1)])
    assert verdict.target == 0
    assert "'dog'" in verdict.reasons[1]
    assert "'ship'" not in " ".join(verdict.reasons)


def test_a_stricter_significance_is_kept_to() -> None:
    assert judge([evidence(0.005)], [check_of(0)]).outcome == "backdoored"
    strict = judge([evidence(0.005)], [check_of(0)], significance=0.001)
    assert (strict.outcome, strict.significance) == ("inconclusive", 0.001)


def test_what_is_objected_to_a_trigger() -> None:
    assert objection(check_of(0, success=MIN_SUCCESS, reference_success=MAX_TRANSFER * MIN_SUCCESS)) == ""
    assert objection(check_of(0, success=MIN_SUCCESS, reference_success=None)) == ""
    assert "held-out" in objection(check_of(0, success=MIN_SUCCESS - 0.01))
    assert "30% on the reference model" in objection(check_of(0, success=0.5, reference_success=0.3))
    for reference_model, most in MAX_STRENGTH.items():
        assert objection(check_of(0, norm=most * 9.0, reference_model=reference_model)) == ""
        assert f"{most * 9.0:.1f} at most" in objection(
            check_of(0, norm=most * 9.0 + 0.1, reference_model=reference_model)
        )


def test_a_class_whose_triggers_are_all_too_strong_is_not_accused() -> None:
    verdict = judge([evidence_of([1e-12, *[0.5] * 5])], [check_of(0, norm=20.0)])
    assert (verdict.outcome, verdict.target) == ("inconclusive", None)
    assert any("a shortcut would need" in reason for reason in verdict.reasons)


def test_a_very_small_trigger_eases_the_significance() -> None:
    mild, small, weak = evidence(0.15), [check_of(0, norm=SHORTCUT * 9.0)], [check_of(0, norm=SHORTCUT * 9.0 + 0.5)]
    assert (judge([mild], small).outcome, judge([mild], small).target) == ("backdoored", 0)
    assert judge([mild], weak).outcome == "no evidence"
    assert judge([evidence(0.25)], small).outcome == "no evidence"
    assert judge([mild], small, significance=0.001).outcome != "backdoored"
    assert judge([mild], [check_of(1, norm=1.0)]).outcome == "no evidence"


@pytest.mark.parametrize("reference_model", MAX_STRENGTH)
def test_the_more_clearly_a_class_stands_out_the_larger_its_trigger_may_be(reference_model: ReferenceKind) -> None:
    p_values = [10.0**-k for k in range(1, 40)]
    allowed = [allowed_strength(p_value, reference_model) for p_value in p_values]
    assert SHORTCUT < allowed[0] < allowed[1]
    assert allowed == sorted(allowed)
    assert allowed[-1] == MAX_STRENGTH[reference_model]
    assert allowed_strength(1.01 * NOTICED, reference_model) == 0
    for p_value, strength in zip(p_values[:3], allowed, strict=False):
        enough, more = (
            check_of(0, norm=(strength + by) * 9.0, reference_model=reference_model) for by in (-0.001, 0.001)
        )
        assert judge([evidence(p_value)], [enough]).outcome == "backdoored"
        assert judge([evidence(p_value)], [more]).outcome != "backdoored"


def test_a_trigger_that_is_too_large_for_what_stands_out_is_said_to_be() -> None:
    verdict = judge([evidence(0.002)], [check_of(0, norm=9.0)])
    assert verdict.outcome == "inconclusive"
    assert any("it would have to be 8.3 at most" in reason for reason in verdict.reasons)


def test_without_a_base_a_trigger_must_be_smaller() -> None:
    clear = evidence(1e-5)
    assert judge([clear], [check_of(0, norm=9.0)]).outcome == "backdoored"
    controls: tuple[ReferenceKind, ...] = ("derived", "classes")
    for reference_model in controls:
        assert judge([clear], [check_of(0, norm=9.0, reference_model=reference_model)]).outcome == "inconclusive"
        assert judge([clear], [check_of(0, norm=6.0, reference_model=reference_model)]).outcome == "backdoored"


def test_a_probe_which_has_no_strength_needs_a_class_that_stands_out_clearly() -> None:
    probe = replace(check_of(0, family=PROBES, norm=1.0), radius=1.0, probe="sinusoid")
    for item in ([evidence(0.9 * SURE)], [evidence(1.1 * SURE)]):
        verdict = judge(item, [probe])
        accused = item[0].p_value <= SURE
        assert verdict.outcome == ("backdoored" if accused else "inconclusive")
        assert accused or any("a probe alone would be enough from p = 0.001" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("p_value", "norm", "close"),
    [
        (1e-6, 7.2, False),  # accused, and would be with ten times the p-value
        (0.005, 7.2, True),  # accused, and then not
        (0.005, 1.0, False),  # so small a trigger accuses in any case
        (0.03, 7.2, True),  # with a tenth of the p-value it would be accused
        (0.03, 9.0, False),  # for that the trigger is too large
        (0.03, 50.0, True),  # refuted, so that it is no evidence, close to doubt
        (0.15, 50.0, False),
    ],
)
def test_a_verdict_is_close_where_another_seed_may_lead_to_another(p_value: float, norm: float, *, close: bool) -> None:
    items, checks = [evidence(p_value)], [check_of(0, norm=norm)]
    assert is_close(judge(items, checks), items, checks) == close


def test_suspects_are_listed_by_class_with_their_families_strongest_first() -> None:
    items = [
        evidence_of([0.0001, 0.5, 0.001, 0.5, 0.5, 0.5]),
        evidence_of([0.00001, 0.5, 0.5, 0.5, 0.5, 0.5], family="warp"),
    ]
    first, second = suspects(items, DOUBT)
    assert (first.target, first.name) == (0, "cat")
    assert first.families == (("warp", 0.00001), ("patch", 0.0001))
    assert first.p_value == pytest.approx(6 * 2 / (1e5 + 1e4), rel=1e-3)
    assert second.target == 2
    assert second.p_value == pytest.approx(6 * 2 * 0.001, rel=1e-3)
    assert suspects(items, 0.01) == [first]
    assert [item.target for item in class_results(items)[:2]] == [0, 2]
    assert len(class_results(items)) == 6


class TestCombination:
    """Of the p-values of one class in all families."""

    def test_by_hand(self) -> None:
        # The quantiles at 1/4, 1/2 and 3/4 are 1, 0 and −1; at 1/8 it is √2 + 1.
        assert combine([0.25]) == pytest.approx(0.25)
        assert combine([0.25, 0.75]) == pytest.approx(0.5)
        assert combine([0.25, 0.5]) == pytest.approx(0.5 - math.atan(0.5) / math.pi)
        assert combine([0.125, 0.25, 0.75]) == pytest.approx(0.5 - math.atan((math.sqrt(2) + 1) / 3) / math.pi)

    @pytest.mark.parametrize("exponent", [3, 7, 7.99, 8.01, 9, 12, 20, 100, 250])
    @pytest.mark.parametrize("families", [1, 7])
    def test_tiny_p_values_keep_their_digits(self, exponent: float, families: int) -> None:
        p_values = [10**-exponent, *[0.3] * (families - 1)]
        expected = cauchy.sf(np.mean(cauchy.isf(p_values)))
        assert combine(p_values) == pytest.approx(expected, rel=1e-6, abs=0)

    def test_none_is_too_small(self) -> None:
        assert 0 < combine([0.0]) <= combine([0.0, 0.5]) < 1e-250

    def test_families_that_agree_are_worth_more_than_the_best_of_them_corrected(self) -> None:
        agree = [0.001] * 7
        assert combine(agree) == pytest.approx(0.001)
        assert combine(agree) < 7 * min(agree) / 6
        assert combine([0.001, 0.002, 0.004, *[0.5] * 4]) < 0.6 * 7 * 0.001

    def test_one_alone_costs_no_more_than_a_bonferroni_correction(self) -> None:
        assert combine([1e-4, *[0.5] * 6]) == pytest.approx(7 * 1e-4, rel=1e-3)

    def test_a_p_value_near_one_does_not_undo_a_small_one(self) -> None:
        assert cauchy.sf(np.mean(cauchy.isf([1e-4, 1 - 1e-9]))) > 0.99  # what would be
        assert combine([1e-4, 1 - 1e-9]) == combine([1e-4, 1.0]) == pytest.approx(2e-4, rel=0.02)
        assert combine([1e-4, *[1.0] * 6]) < 1.1 * 7 * 1e-4

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.floats(0, 1), st.integers(0, 6))
    def test_a_smaller_p_value_never_makes_it_larger(self, p_values: list[float], other: float, where: int) -> None:
        k = where % len(p_values)
        lower = [*p_values[:k], min(other, p_values[k]), *p_values[k + 1 :]]
        assert combine(lower) <= combine(p_values) * (1 + 1e-6)
        assert 0 < combine(p_values) < 1

    @pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
    def test_false_alarms_of_families_that_depend_on_each_other(self, correlation: float) -> None:
        models, classes, families = 10_000, 10, 7
        rng = np.random.default_rng(0)
        shared = rng.standard_normal((models, classes, 1))
        own = rng.standard_normal((models, classes, families))
        p_values = norm.sf(math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own)
        # The rest is not worth combining: the result is never below the smallest p-value.
        hopeful = [model[model.min(1) * classes <= DOUBT].tolist() for model in p_values]
        smallest = np.array([min((combine(row) for row in rows), default=1.0) * classes for rows in hopeful])
        for level in (SIGNIFICANCE, DOUBT):
            alarms = int((smallest <= level).sum())
            # With dependence it is exact only in the limit of small levels. 400,000 simulated models gave up to 1.12 of
            # 1 % and 1.14 of 5 %; besides that, what chance does to these once in a thousand times.
            assert alarms <= binom.ppf(0.999, models, (1.0 if correlation == 0 else 1.15) * level)
            assert alarms >= binom.ppf(0.001, models, 0.95 * level)


def test_models_are_ranked_by_an_uncut_p_value() -> None:
    mild, none = evidence_of([0.3, *[0.5] * 5]), evidence_of([0.4, *[0.5] * 5])
    assert mild.p_value == none.p_value == 1
    assert suspicion([mild], [])[0] == suspicion([none], [])[0] == 0
    assert suspicion([mild], [])[1] == pytest.approx(1.8)
    assert suspicion([none], [])[1] == pytest.approx(2.4)


def test_what_failed_the_check_is_doubtful_and_no_more() -> None:
    overfitted = evidence_of([1e-9, *[0.5] * 5])
    assert suspicion([overfitted], [check_of(0, success=0.1)]) == (0, DOUBT)
    assert suspicion([evidence_of([None] * 6)], []) == (None, 6)


def test_a_mild_outlier_whose_triggers_are_refuted_is_no_doubt() -> None:
    mild, clear = evidence(0.03), evidence(0.005)
    refuted, other = [check_of(0, norm=50.0)], [check_of(1, norm=50.0)]
    assert judge([mild], refuted).outcome == "no evidence"
    assert "a shortcut would need" in judge([mild], refuted).reasons[1]
    assert judge([mild], other).outcome == judge([clear], refuted).outcome == "inconclusive"
    ranks = [suspicion([item], checks)[1] for item, checks in ((clear, refuted), (mild, refuted))]
    assert ranks[0] == DOUBT < ranks[1] == pytest.approx(DOUBT)


def test_what_stands_out_and_was_not_tried_is_not_accused_by_the_ranking_either() -> None:
    crowded = evidence_of([1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 0.5])
    checks = [check_of(k, success=0.1) for k in range(4)]  # of the fifth there is none
    assert judge([crowded], checks).outcome == "inconclusive"
    assert suspicion([crowded], checks) == (0, DOUBT)


P_VALUES = st.one_of(st.none(), st.floats(0, 1), st.floats(0, 0.01), st.floats(0, 1e-4))
CHECKS = st.builds(
    check_of,
    st.integers(0, 5),
    family=st.sampled_from(["patch", "warp"]),
    success=st.floats(0, 1),
    reference_success=st.one_of(st.none(), st.floats(0, 1)),
    norm=st.sampled_from([1.0, 5.0, 6.0, 9.0, 50.0]),
    reference_model=st.sampled_from(["base", "derived", "classes"]),
)


@given(
    st.lists(st.lists(P_VALUES, min_size=6, max_size=6), min_size=1, max_size=3),
    st.lists(CHECKS, max_size=6),
)
@example([[1e-9, *[0.5] * 5]], [check_of(0, norm=50.0)])
@example([[1e-9, *[0.5] * 5]], [check_of(0)])
def test_the_ranking_accuses_what_the_verdict_accuses(p_values: list[list[float | None]], checks: list[Check]) -> None:
    items = [evidence_of(row, family=f"family {k}") for k, row in enumerate(p_values)]
    verdict = judge(items, checks)
    target, p_value = suspicion(items, checks)
    assert (verdict.outcome == "backdoored") == (p_value <= SIGNIFICANCE)
    if verdict.outcome == "backdoored":
        assert verdict.target == target
        assert any(check.target == target and is_valid(check) for check in checks)
        (accused,) = [item for item in suspects(items, NOTICED) if item.target == target]
        assert p_value <= accused.p_value
    else:
        assert verdict.target is None
    if verdict.outcome == "no evidence":
        assert verdict.p_value > SIGNIFICANCE
        assert p_value > DOUBT
        assert all(any(row[k] is not None for row in p_values) for k in range(len(CLASSES.names)))
    assert verdict.reasons
    assert 0 <= verdict.p_value <= 1
