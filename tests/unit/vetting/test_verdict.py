import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.vetting import Check, Evidence, judge
from guard.vetting.verdict import (
    DOUBT,
    MAX_TRANSFER,
    MIN_SUCCESS,
    SIGNIFICANCE,
    is_valid,
    objection,
    suspects,
    suspicion,
)
from tests.conftest import CLASSES
from tests.zoo import check_of, evidence_of


def evidence(p_value: float, *, families: int = 1, target: int = 0, family: str = "patch") -> Evidence:
    """One class has this p-value, corrected; the others have nothing to say."""
    p_values = [1.0] * 6
    p_values[target] = p_value / (6 * families)
    return evidence_of(p_values, family=family, families=families)


def test_a_significant_class_with_a_trigger_that_works_elsewhere_is_a_backdoor() -> None:
    items = [evidence(0.9, families=2, family="additive"), evidence(0.001, families=2)]
    verdict = judge(items, [check_of(0)])
    assert (verdict.outcome, verdict.target) == ("backdoored", 0)
    assert verdict.p_value == pytest.approx(0.001)
    assert verdict.families == ("additive", "patch")
    assert "moves 90% of held-out images" in verdict.reasons[0]


def test_the_trigger_may_be_of_another_family_than_the_evidence() -> None:
    items = [evidence(0.001, families=2), evidence(0.9, families=2, family="warp")]
    assert judge(items, [check_of(0, success=0.1), check_of(0, family="warp")]).outcome == "backdoored"


def test_p_values_are_corrected_for_classes_and_families() -> None:
    item = evidence(0.008)
    assert judge([item], [check_of(0)]).outcome == "backdoored"
    verdict = judge([item, evidence_of([1.0] * 6, family="warp")], [check_of(0)])
    assert verdict.p_value == pytest.approx(0.016)
    assert verdict.outcome == "inconclusive"


@pytest.mark.parametrize(
    ("items", "checks", "reason"),
    [
        ([evidence(0.001)], [check_of(0, success=0.3)], "moves only 30% of held-out"),
        ([evidence(0.001)], [check_of(0, control_success=0.8)], "natural feature"),
        ([evidence(0.001)], [], "stands out"),
        ([evidence(0.001)], [check_of(1)], "stands out"),
        ([evidence(0.03)], [check_of(0)], "stands out"),
        ([evidence_of([None] * 6)], [], "no p-value for patch"),
        ([evidence(0.9, families=2), evidence_of([None] * 6, family="warp")], [], "no p-value for warp"),
        ([evidence_of([None, *[0.5] * 5])], [], "no family could compare 'cat'"),
    ],
)
def test_doubt_is_inconclusive_and_says_why(items: list[Evidence], checks: list[Check], reason: str) -> None:
    verdict = judge(items, checks)
    assert verdict.outcome == "inconclusive"
    assert verdict.target is None
    assert reason in " ".join(verdict.reasons)


def test_nothing_standing_out_is_no_evidence_of_the_families_tested() -> None:
    verdict = judge([evidence(0.4, families=2), evidence(0.9, families=2, family="warp")], [])
    assert (verdict.outcome, verdict.target, verdict.families) == ("no evidence", None, ("patch", "warp"))
    assert "patch, warp" in verdict.reasons[0]


def test_a_class_that_one_family_compared_is_not_lost() -> None:
    items = [evidence_of([None, *[0.5] * 5]), evidence_of([0.5] * 6, family="warp")]
    assert judge(items, []).outcome == "no evidence"


def test_a_refuted_class_does_not_hide_a_backdoor_behind_it() -> None:
    items = [evidence(1e-6, families=2), evidence(0.002, families=2, target=2, family="warp")]
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
    assert objection(check_of(0, success=MIN_SUCCESS, control_success=MAX_TRANSFER * MIN_SUCCESS)) == ""
    assert objection(check_of(0, success=MIN_SUCCESS, control_success=None)) == ""
    assert "held-out" in objection(check_of(0, success=MIN_SUCCESS - 0.01))
    assert "on the control 30%" in objection(check_of(0, success=0.5, control_success=0.3))


def test_suspects_are_listed_by_class_with_their_families_strongest_first() -> None:
    items = [
        evidence_of([0.0001, 0.9, 0.001, 0.9, 0.9, 0.9]),
        evidence_of([0.00001, 0.9, 0.9, 0.9, 0.9, 0.9], family="warp"),
    ]
    found = suspects(items, DOUBT)
    assert list(found) == [0, 2]
    assert [family for family, _ in found[0]] == ["warp", "patch"]
    assert [p_value for _, p_value in found[0]] == pytest.approx([0.00012, 0.0012])
    assert suspects(items, 0.01).keys() == {0}


def test_models_are_ranked_by_an_uncut_p_value() -> None:
    mild, none = evidence_of([0.3, *[0.5] * 5]), evidence_of([0.4, *[0.5] * 5])
    assert mild.p_value == none.p_value == 1
    assert suspicion([mild], [])[0] == suspicion([none], [])[0] == 0
    assert suspicion([mild], [])[1] == pytest.approx(1.8)
    assert suspicion([none], [])[1] == pytest.approx(2.4)


def test_what_failed_the_check_is_not_suspicious() -> None:
    overfitted = evidence_of([1e-9, *[0.5] * 5])
    assert suspicion([overfitted], [check_of(0, success=0.1)]) == (1, 3)
    assert suspicion([evidence_of([None] * 6)], []) == (None, 6)


def test_what_stands_out_and_was_not_tried_is_not_accused_by_the_ranking_either() -> None:
    crowded = evidence_of([1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 0.5])
    checks = [check_of(k, success=0.1) for k in range(4)]  # of the fifth there is none
    assert judge([crowded], checks).outcome == "inconclusive"
    assert suspicion([crowded], checks) == (5, 3)


P_VALUES = st.one_of(st.none(), st.floats(0, 1), st.floats(0, 0.01), st.floats(0, 1e-4))
CHECKS = st.builds(
    check_of,
    st.integers(0, 5),
    family=st.sampled_from(["patch", "warp"]),
    success=st.floats(0, 1),
    control_success=st.one_of(st.none(), st.floats(0, 1)),
)


@given(st.lists(st.lists(P_VALUES, min_size=6, max_size=6), min_size=1, max_size=3), st.lists(CHECKS, max_size=6))
def test_the_ranking_accuses_what_the_verdict_accuses(p_values: list[list[float | None]], checks: list[Check]) -> None:
    items = [evidence_of(row, family=f"family {k}", families=len(p_values)) for k, row in enumerate(p_values)]
    verdict = judge(items, checks)
    target, p_value = suspicion(items, checks)
    assert (verdict.outcome == "backdoored") == (p_value <= SIGNIFICANCE)
    if verdict.outcome == "backdoored":
        assert verdict.target == target
        assert any(check.target == target and is_valid(check) for check in checks)
        assert target in suspects(items, SIGNIFICANCE)
    else:
        assert verdict.target is None
    if verdict.outcome == "no evidence":
        assert verdict.p_value > DOUBT
        assert all(any(row[k] is not None for row in p_values) for k in range(len(CLASSES.names)))
    assert verdict.reasons
    assert 0 <= verdict.p_value <= 1
