from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from guard.classifiers import Classifier, load
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import UsageError
from guard.vetting import BUDGETS, Vetting, agreed, judge, vet
from guard.vetting.agreement import combined
from guard.vetting.budgets import (
    DerivedReferenceSettings,
    Effort,
    InspectionSettings,
    SearchSettings,
    TargetSearchSettings,
)
from guard.vetting.reference import fresh_prompts
from guard.vetting.results import Verdict
from guard.vetting.search import search_targets
from tests.conftest import tiny_model
from tests.unit.classifiers.test_prompts import learner
from tests.zoo import TARGET, FakeVetting, check_of, evidence_of

SHORT = Effort(
    InspectionSettings(steps=2, batch=8, average=2),
    SearchSettings(steps=2, batch=8),
    DerivedReferenceSettings(steps=1, batch=8),
    TargetSearchSettings(steps=1, batch=8, starts=1),
)
NOTHING = Verdict("no evidence", None, 0.5, ("patch",), 0.01, ("no class stands out",))


@pytest.fixture
def accusing(model_directory: Path, images: torch.Tensor) -> Vetting:
    return FakeVetting(model_directory.name)(load(str(model_directory), device="cpu"), images)


def saying(vetting: Vetting, *p_values: float | None, size: float = 7.2, target: int = TARGET) -> Vetting:
    """The vetting with these uncorrected p-values, and, for a class that stands out, a trigger of this norm."""
    results = (evidence_of(p_values),)
    checks = (check_of(target, norm=size),) if (p_values[target] or 1.0) < 0.01 else ()
    return replace(
        vetting, results=results, checks=checks, triggers=vetting.triggers if checks else (),
        verdict=judge(results, checks),
    )  # fmt: skip


def test_one_vetting_is_returned_as_it_is(accusing: Vetting) -> None:
    assert agreed([accusing]) is accusing


def test_evidence_that_every_seed_finds_stays_what_it_is(accusing: Vetting) -> None:
    found = agreed([accusing, accusing])
    assert (found.verdict.outcome, found.verdict.target) == ("backdoored", TARGET)
    assert found.verdict.p_value == pytest.approx(accusing.verdict.p_value)
    assert "2 vettings with different seeds was combined; alone they say backdoored" in found.verdict.reasons[-1]
    assert found.passes == 2 * accusing.passes
    assert [trigger.id for trigger in found.triggers] == [trigger.id for trigger in accusing.triggers]
    assert found.triggers[0].p_value == pytest.approx(accusing.verdict.p_value)


def test_what_one_seed_of_three_finds_is_not_enough_and_what_two_find_clearly_is(accusing: Vetting) -> None:
    loud, still = saying(accusing, 0.5, 1e-3, 0.5, 0.5, 0.5, 0.5), saying(accusing, *[0.5] * 6)
    assert loud.verdict.outcome == "backdoored"
    found = agreed([still, loud, still])
    assert (found.verdict.outcome, found.verdict.target, found.triggers) == ("no evidence", None, ())
    assert "no evidence by 2, backdoored (class 1) by 1" in found.verdict.reasons[-1]
    clear = saying(accusing, 0.5, 1e-7, 0.5, 0.5, 0.5, 0.5)
    found = agreed([clear, still, clear])
    assert (found.verdict.outcome, found.verdict.target) == ("backdoored", TARGET)
    assert found.verdict.p_value > 1000 * clear.verdict.p_value


def test_of_the_triggers_of_a_class_those_of_the_vetting_in_the_middle_count(accusing: Vetting) -> None:
    def of_norms(*norms: float) -> Vetting:
        return agreed([saying(accusing, 0.5, 1e-3, 0.5, 0.5, 0.5, 0.5, size=norm) for norm in norms])

    assert [check.norm for check in of_norms(20.0, 1.0, 7.0).checks] == [7.0]
    assert of_norms(20.0, 1.0, 7.0).verdict.outcome == "backdoored"
    assert of_norms(20.0, 19.0, 1.0).verdict.outcome == "inconclusive"
    assert of_norms(1.0, 19.0).verdict.outcome == "inconclusive"


def test_of_two_targets_each_may_be_found_by_another_seed(accusing: Vetting) -> None:
    other = TARGET + 1
    first = saying(accusing, 0.5, 1e-6, 1e-5, 0.5, 0.5, 0.5)
    second = saying(accusing, 0.5, 1e-5, 1e-6, 0.5, 0.5, 0.5, target=other)
    found = agreed([first, second])
    assert found.verdict.outcome == "backdoored"
    assert {check.target for check in found.checks} == {TARGET, other}
    assert len(found.verdict.reasons) == 3, "the second target is named too"


def test_a_class_that_was_inspected_with_some_seeds_only_counts_as_ordinary_with_the_others(accusing: Vetting) -> None:
    found = agreed([saying(accusing, 0.5, 1e-9, *[0.5] * 4), saying(accusing, 0.5, None, *[0.5] * 4)])
    (entry,) = [entry for entry in found.results[0].classes if entry.target == TARGET]
    assert entry.p_value == pytest.approx(norm.sf(norm.isf(1e-9) / 2))


@given(st.lists(st.floats(1e-200, 0.99), min_size=1, max_size=5))
def test_combined_p_values_lie_between_the_smallest_and_the_largest(p_values: list[float]) -> None:
    found = combined(p_values)
    assert found is not None
    assert 0.999 * min(p_values) <= found <= 1.001 * max(p_values)
    assert found == pytest.approx(float(norm.sf(norm.isf(p_values).mean())), rel=1e-6)


def test_p_values_at_the_ends_and_missing_ones() -> None:
    assert combined([None, None]) is None
    assert combined([0.0, 1.0]) == pytest.approx(combined([1e-300, 0.99]))
    assert combined([0.01, None]) == pytest.approx(combined([0.01, 0.5]))


@pytest.fixture
def told() -> list[tuple[str, int, int]]:
    """What the progress of vettings was told as."""
    return []


@pytest.fixture
def vetted(
    classifier: Classifier,
    images: torch.Tensor,
    accusing: Vetting,
    told: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Vetting, list[int]]]:
    """Vets with p-values of one class that are given, one for each seed, and tells which seeds were used."""

    def run(*p_values: float, repeats: int | None = None) -> tuple[Vetting, list[int]]:
        seeds: list[int] = []

        def fake(_: Any, effort: Effort, progress: Callable[[str, int, int], None]) -> Vetting:
            p_value = p_values[len(seeds)]
            seeds.append(effort.inspection.seed)
            progress("patch", 1, 2)
            return saying(accusing, 0.5, p_value / 6, 0.5, 0.5, 0.5, 0.5)

        monkeypatch.setattr("guard.vetting.examination._Examination.vetted", fake)
        return vet(classifier, images, seed=4, repeats=repeats, progress=lambda *each: told.append(each)), seeds

    return run


def test_seeds_are_added_while_the_verdict_is_close_to_a_threshold(
    vetted: Callable[..., tuple[Vetting, list[int]]],
) -> None:
    found, seeds = vetted(0.005, 0.004, 0.002)
    assert (found.verdict.outcome, seeds) == ("backdoored", [4, 5, 6])
    found, seeds = vetted(0.005, 1e-8)
    assert (found.verdict.outcome, seeds) == ("backdoored", [4, 5]), "two are clear enough"
    found, seeds = vetted(0.06, 0.9)
    assert (found.verdict.outcome, seeds) == ("no evidence", [4, 5])


@pytest.mark.parametrize(("p_value", "outcome"), [(1e-5, "backdoored"), (0.4, "no evidence")])
def test_a_verdict_that_no_seed_would_change_is_not_looked_at_again(
    vetted: Callable[..., tuple[Vetting, list[int]]], p_value: float, outcome: str
) -> None:
    found, seeds = vetted(p_value)
    assert (found.verdict.outcome, seeds) == (outcome, [4])


def test_progress_names_the_seeds_that_come_after_the_first(
    vetted: Callable[..., tuple[Vetting, list[int]]], told: list[tuple[str, int, int]]
) -> None:
    vetted(0.3, 0.4, repeats=2)
    assert told == [("patch", 1, 2), ("seed 5, patch", 1, 2)]


def test_a_number_of_vettings_that_is_asked_for_is_kept(vetted: Callable[..., tuple[Vetting, list[int]]]) -> None:
    assert vetted(1e-5, 1e-5, repeats=2)[1] == [4, 5]
    assert vetted(0.005, repeats=1)[1] == [4]


def test_no_vetting_says_nothing() -> None:
    with pytest.raises(UsageError, match="at least one seed"):
        agreed([])


@pytest.mark.parametrize("derive", [True, False])
@pytest.mark.parametrize("base", ["none", "loaded", "others"])
def test_a_prompt_learner_is_compared_with_fresh_prompts_on_towers_that_somebody_vouches_for(
    base: str, model_directory: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, *, derive: bool
) -> None:
    """What lies in its own towers is in both, unless they are those of a base."""
    monkeypatch.setitem(BUDGETS, "quick", SHORT)
    monkeypatch.setattr("guard.vetting.examination.judge", lambda *_: NOTHING)
    monkeypatch.setattr("guard.vetting.examination._LEAST_AGREEMENT", 0.0)
    monkeypatch.setattr("guard.vetting.examination.difference", lambda *_: None)
    used: list[Classifier] = []
    tune = fresh_prompts

    def seen(*arguments: Any, **named: Any) -> Any:
        made = tune(*arguments, **named)
        used.append(made[0])
        return made

    monkeypatch.setattr("guard.vetting.examination.fresh_prompts", seen)
    suspect = PromptedClassifier(load(str(model_directory), device="cpu"), learner("coop"))
    loaded = load(str(model_directory), device="cpu")
    given = {"none": None, "loaded": loaded, "others": loaded.with_model(tiny_model(3), "another")}[base]
    vetting = vet(suspect, images, base=given, derive=derive, budget="quick", families=["patch"], repeats=1)
    assert len(used) == derive
    if derive:
        assert vetting.reference_model.kind == ("derived" if base == "none" else "towers")
        wanted = given if base == "others" else suspect.towers
        assert wanted is not None
        assert isinstance(used[0], PromptedClassifier)
        assert used[0].towers.digest == wanted.digest
    else:
        assert vetting.reference_model.kind == ("classes" if base == "none" else "base")
    unvouched = derive and base == "none"
    assert vetting.verdict.outcome == ("inconclusive" if unvouched else "no evidence")
    assert ("nobody vouches for" in vetting.verdict.reasons[0]) == unvouched


def test_the_search_that_names_no_class_moves_for_prompts_on_shared_towers(
    classifier: Classifier, images: torch.Tensor
) -> None:
    """Embeddings are the same on both sides there, and only answers differ."""
    suspect = PromptedClassifier(classifier, learner("coop"))
    settings = TargetSearchSettings(steps=3, batch=8, starts=2)
    found = search_targets(suspect, images, "additive", settings, reference_model=classifier)
    assert all(each.concentration != 0 for each in found)
