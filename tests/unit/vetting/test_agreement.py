from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.classifiers import Classifier, ClassList, load
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import UsageError
from guard.vetting import BUDGETS, Vetting, agreed, vet
from guard.vetting.agreement import borne_out
from guard.vetting.budgets import (
    DerivedReferenceSettings,
    Effort,
    InspectionSettings,
    SearchSettings,
    TargetSearchSettings,
)
from guard.vetting.results import Conclusion, Verdict
from guard.vetting.search import search_targets
from guard.vetting.verdict import class_results
from tests.unit.classifiers.test_prompts import learner
from tests.zoo import TARGET, FakeVetting

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
    elsewhere = replace(accusing, verdict=replace(accusing.verdict, target=TARGET + 1))
    assert agreed([accusing, elsewhere]).verdict.outcome == "inconclusive"


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
    found, seeds = vetted(("backdoored", 0.005), ("inconclusive", 0.02), ("backdoored", 0.002))
    assert (found.verdict.outcome, seeds) == ("inconclusive", [4, 5, 6])
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


@pytest.mark.parametrize("derive", [True, False])
def test_an_accused_prompt_learner_is_compared_with_freshly_tuned_prompts(
    classifier: Classifier, images: torch.Tensor, accusing: Vetting, monkeypatch: pytest.MonkeyPatch, *, derive: bool
) -> None:
    monkeypatch.setattr("guard.vetting.examination._Examination.vetted", lambda *_, **__: accusing)
    accusing = replace(accusing, effort=SHORT)
    suspect = PromptedClassifier(classifier, learner("coop"))
    found = vet(suspect, images, base=classifier, derive=derive, families=["patch"])
    said = [reason for reason in found.verdict.reasons if "tuned anew on its answers" in reason]
    assert len(said) == derive
    assert (found.passes > accusing.passes) == derive


def test_no_vetting_says_nothing() -> None:
    with pytest.raises(UsageError, match="at least one seed"):
        agreed([])


def test_an_accusation_that_another_reference_does_not_bear_out_is_inconclusive(accusing: Vetting) -> None:
    verdict = accusing.verdict
    assert borne_out(verdict, 0.01).target == TARGET
    assert "stands out as well (p = 0.01)" in borne_out(verdict, 0.01).reasons[-1]
    refuted = borne_out(verdict, 0.3)
    assert (refuted.outcome, refuted.target) == ("inconclusive", None)
    assert "does not stand out (p = 0.3)" in refuted.reasons[0]
    assert borne_out(verdict).outcome == "backdoored"


@pytest.mark.parametrize("base", ["none", "own", "loaded"])
def test_towers_that_came_with_the_prompts_are_no_base(
    base: str, model_directory: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in them is in both. Somebody who loads the same weights from elsewhere vouches for them."""
    monkeypatch.setitem(BUDGETS, "quick", SHORT)
    monkeypatch.setattr("guard.vetting.examination.judge", lambda *_: NOTHING)
    suspect = PromptedClassifier(load(str(model_directory), device="cpu"), learner("coop"))
    given = {"none": None, "own": suspect.towers, "loaded": load(str(model_directory), device="cpu")}[base]
    vetting = vet(suspect, images, base=given, budget="quick", families=["patch"], repeats=1)
    assert vetting.reference_model.kind == {"none": "derived", "own": "towers", "loaded": "base"}[base]
    assert vetting.verdict.outcome == ("no evidence" if base == "loaded" else "inconclusive")
    assert ("nobody vouches for" in vetting.verdict.reasons[0]) == (base != "loaded")


def test_an_accused_class_is_compared_again_also_among_many(
    model_directory: Path, images: torch.Tensor, accusing: Vetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hints at nothing against fresh prompts is inspected there all the same."""
    names = tuple(f"thing {word}" for word in "abcdefghijklmnopqrstuvwxyz") + tuple(f"sort {k}" for k in "abcdefghijkl")
    towers = load(str(model_directory), device="cpu", classes=ClassList(names, ("a {}",)))
    suspect, inspected = PromptedClassifier(towers, learner("coop")), []
    verdict = replace(accusing.verdict, target=30)
    accusing = replace(accusing, effort=SHORT, verdict=verdict)
    monkeypatch.setattr("guard.vetting.examination._Examination.vetted", lambda *_, **__: accusing)

    def seen(results: Any) -> Any:
        inspected.append({entry.target for item in results[:-1] for entry in item.classes})
        return class_results(results)

    monkeypatch.setattr("guard.vetting.examination.class_results", seen)
    vet(suspect, images, base=towers, families=["patch"])
    assert 30 in inspected[0]
    assert len(inspected[0]) < len(names)


def test_the_search_that_names_no_class_moves_for_prompts_on_shared_towers(
    classifier: Classifier, images: torch.Tensor
) -> None:
    """Embeddings are the same on both sides there, and only answers differ."""
    suspect = PromptedClassifier(classifier, learner("coop"))
    settings = TargetSearchSettings(steps=3, batch=8, starts=2)
    found = search_targets(suspect, images, "additive", settings, reference_model=classifier)
    assert all(each.concentration != 0 for each in found)
