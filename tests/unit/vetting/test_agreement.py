from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.classifiers import Classifier, load
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import UsageError
from guard.vetting import BUDGETS, Vetting, agreed, judge, vet
from guard.vetting.budgets import (
    DerivedReferenceSettings,
    Effort,
    InspectionSettings,
    SearchSettings,
    TargetSearchSettings,
)
from guard.vetting.reference import fresh_prompts
from guard.vetting.results import Conclusion, Verdict
from guard.vetting.search import search_targets
from tests.conftest import tiny_model
from tests.unit.classifiers.test_prompts import learner
from tests.zoo import TARGET, FakeVetting, evidence_of

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


@pytest.fixture
def silent(classifier: Classifier, images: torch.Tensor) -> Vetting:
    return FakeVetting()(classifier, images)


def test_vettings_that_agree_give_their_verdict(accusing: Vetting, silent: Vetting) -> None:
    assert agreed([silent]) == silent
    found = agreed([accusing, accusing])
    assert (found.verdict.outcome, found.verdict.target) == ("backdoored", TARGET)
    assert found.verdict.reasons[-1] == "2 vettings with different seeds agree"
    assert found.passes == 2 * accusing.passes


def test_what_depends_on_the_seed_is_inconclusive_and_keeps_the_triggers(accusing: Vetting, silent: Vetting) -> None:
    found = agreed([silent, accusing, silent])
    assert (found.verdict.outcome, found.verdict.target) == ("inconclusive", None)
    assert "no evidence by 2, backdoored (class 1) by 1" in found.verdict.reasons[0]
    assert found.triggers == accusing.triggers
    assert agreed([accusing, of_classes(accusing, TARGET + 1)]).verdict.outcome == "inconclusive"


def of_classes(accusing: Vetting, *targets: int) -> Vetting:
    """The same accusation of other classes, of which the first stands out most."""
    p_values: list[float | None] = [0.5] * 4
    for k, target in enumerate(targets):
        p_values[target] = 1e-6 * 10**k
    results = (evidence_of(p_values),)
    checks = tuple(replace(check, target=target) for check in accusing.checks for target in targets)
    return replace(accusing, results=results, checks=checks, verdict=judge(results, checks))


def test_of_two_targets_either_may_come_first(accusing: Vetting) -> None:
    other = TARGET + 1
    found = agreed([of_classes(accusing, TARGET, other), of_classes(accusing, other, TARGET)])
    assert (found.verdict.outcome, len(found.triggers)) == ("backdoored", len(accusing.triggers))
    # A vetting that sees one of the two names the class on which all agree.
    assert agreed([of_classes(accusing, other, TARGET), of_classes(accusing, TARGET)]).verdict.target == TARGET


@pytest.fixture
def vetted(
    classifier: Classifier, images: torch.Tensor, silent: Vetting, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Vetting, list[int]]]:
    """Vets with verdicts that are given, one for each seed, and tells which seeds were used."""

    def run(*verdicts: tuple[Conclusion, float], repeats: int | None = None) -> tuple[Vetting, list[int]]:
        seeds: list[int] = []

        def fake(_: Any, __: Any, effort: Effort, **___: Any) -> Vetting:
            outcome, p_value = verdicts[len(seeds)]
            seeds.append(effort.inspection.seed)
            return replace(silent, verdict=replace(silent.verdict, outcome=outcome, p_value=p_value))

        monkeypatch.setattr("guard.vetting.examination._Examination.vetted", fake)
        return vet(classifier, images, seed=4, repeats=repeats), seeds

    return run


def test_a_verdict_close_to_a_threshold_is_looked_at_again(vetted: Callable[..., tuple[Vetting, list[int]]]) -> None:
    found, seeds = vetted(("backdoored", 0.005), ("inconclusive", 0.02))
    assert (found.verdict.outcome, seeds) == ("inconclusive", [4, 5]), "a third would change nothing"
    found, seeds = vetted(("backdoored", 0.005), ("backdoored", 0.004), ("backdoored", 0.002))
    assert (found.verdict.outcome, seeds) == ("backdoored", [4, 5, 6])
    found, seeds = vetted(("no evidence", 0.06), ("no evidence", 0.3), ("inconclusive", 0.04))
    assert (found.verdict.outcome, seeds) == ("inconclusive", [4, 5, 6])


@pytest.mark.parametrize("verdict", [("backdoored", 1e-5), ("no evidence", 0.4), ("inconclusive", 0.02)])
def test_a_verdict_that_no_seed_would_change_is_not(
    vetted: Callable[..., tuple[Vetting, list[int]]], verdict: tuple[Conclusion, float]
) -> None:
    found, seeds = vetted(verdict)
    assert (found.verdict.outcome, seeds) == (verdict[0], [4])


def test_a_number_of_vettings_that_is_asked_for_is_kept(vetted: Callable[..., tuple[Vetting, list[int]]]) -> None:
    assert vetted(("backdoored", 1e-5), ("backdoored", 1e-5), repeats=2)[1] == [4, 5]
    assert vetted(("backdoored", 0.005), repeats=1)[1] == [4]


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
