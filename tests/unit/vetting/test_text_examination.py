import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.classifiers import Classifier
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import UsageError
from guard.profiles import Profile
from guard.report import render
from guard.vetting import TextVetting, Verdict, judge_text, vet_text
from guard.vetting.drift import drift
from guard.vetting.text_examination import without_prompts
from guard.vetting.text_reference import TEXT_REFERENCE, derive_text_reference
from guard.vetting.text_results import TextStatistic, TextTriggerRecord
from guard.vetting.text_verdict import with_text
from tests.conftest import tiny_model
from tests.texts import PROMPTS, base, text_classifier, trained
from tests.unit.classifiers.test_prompts import learner


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def found(cache: Path) -> TextVetting:
    return examined(cache=cache)


def examined(**more: Any) -> TextVetting:
    model = trained("eos-only-5").classifier
    return vet_text(model, PROMPTS, base=base(), budget="quick", captions=["a white teapot"], **more)


def test_a_planted_trigger_leads_on_the_suspect_only(found: TextVetting) -> None:
    values = {item.family: (item.value, item.swapped) for item in found.statistics}
    assert list(values) == ["pseudo-token", "text token", "text probe", "text drift"]
    assert values["pseudo-token"][0] > values["pseudo-token"][1]
    assert found.trigger.success > found.trigger.reference_success
    assert len(found.trigger.feature) == 32
    assert math.isclose(sum(value**2 for value in found.trigger.feature), 1, abs_tol=1e-3)
    made = trained("eos-only-5")
    assert made.target is not None
    assert float(torch.tensor(found.trigger.feature) @ made.target) > 0.6
    assert len(found.assimilation.plain) == len(found.assimilation.triggered) == found.prompts[1]


def test_the_same_seed_gives_the_same_result(found: TextVetting) -> None:
    assert replace(examined(), seconds=found.seconds) == found


def test_an_examination_that_was_interrupted_goes_on(
    found: TextVetting, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("this was done already")

    for name in ("search", "probe_leads"):
        monkeypatch.setattr(f"guard.vetting.text_examination.{name}", forbidden)
    assert replace(examined(cache=cache), seconds=found.seconds) == found
    damaged = min(cache.iterdir())
    damaged.write_bytes(b"no longer a file of searches")
    with pytest.raises(AssertionError, match="done already"):
        examined(cache=cache)


def test_a_profile_of_the_text_tower_alone_keeps_what_was_found(found: TextVetting, tmp_path: Path) -> None:
    profile = Profile.build(trained("eos-only-5").classifier, None, text=found)
    profile.save(tmp_path / "profile", report=render(profile, {}))
    again = Profile.open(tmp_path / "profile").document
    assert again.text == found
    assert again.vetting.verdict == found.verdict
    page = (tmp_path / "profile" / "report.html").read_text(encoding="utf-8")
    assert f"Text tower: {found.verdict.outcome}" in page
    assert "<svg" in page


def test_a_profile_needs_the_examination_of_a_tower() -> None:
    with pytest.raises(UsageError, match="at least one tower"):
        Profile.build(base(), None)


def test_a_derived_reference_keeps_the_meaning_of_prompts_and_the_suspect() -> None:
    before = {name: value.clone() for name, value in base().model.state_dict().items()}
    made, passes = derive_text_reference(base(), PROMPTS, replace(TEXT_REFERENCE, steps=60))
    cosines = (made.encode_texts(PROMPTS[:40]) * base().encode_texts(PROMPTS[:40])).sum(-1)
    assert cosines.mean() > 0.8
    assert passes == len(PROMPTS) + 60 * 32
    assert all(torch.equal(value, before[name]) for name, value in base().model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "prompts", "says"),
    [
        (base, PROMPTS, "itself"),
        (lambda: text_classifier(width=16), PROMPTS, "another width"),
        (lambda: text_classifier(1), PROMPTS[:20], "different prompts"),
        (lambda: text_classifier(1), [f"{'word ' * 40}{k}" for k in range(200)], "leave room"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: Callable[[], Classifier], prompts: Sequence[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        vet_text(base(), prompts, base=other())


TRIGGER = TextTriggerRecord("text token", "end", "zz", 0.9, 0.95, 0.1, (), (), (1.0,))


def _statistics(*p_values: float | None) -> tuple[TextStatistic, ...]:
    return tuple(TextStatistic("text token", "lead", 0.9, 0.1, p, "null") for p in p_values[:1]) + tuple(
        TextStatistic("pseudo-token", "lead", 0.9, 0.1, p, "null") for p in p_values[1:]
    )


@pytest.mark.parametrize(
    ("p_values", "changes", "outcome"),
    [
        ((1e-4, 0.5), {}, "backdoored"),
        ((1e-4, 0.5), {"success": 0.4}, "inconclusive"),
        ((1e-4, 0.5), {"reference_success": 0.6}, "inconclusive"),
        ((0.015, 0.9), {}, "inconclusive"),
        ((0.015, 0.9), {"success": 0.1}, "no evidence"),
        ((0.4, 0.3), {}, "no evidence"),
        ((None, None), {}, "inconclusive"),
    ],
)
def test_the_verdict_needs_a_small_p_value_and_a_trigger_that_works_on_the_suspect_alone(
    p_values: tuple[float | None, ...], changes: dict[str, float], outcome: str
) -> None:
    verdict = judge_text(_statistics(*p_values), replace(TRIGGER, **changes))  # type: ignore[arg-type]
    assert verdict.outcome == outcome
    assert verdict.reasons


def test_of_two_towers_the_worse_verdict_counts() -> None:
    image = Verdict("no evidence", None, 0.5, ("patch",), 0.01, ("no class stands out",))
    text = judge_text(_statistics(1e-5, 1e-5), TRIGGER)
    both = with_text(image, text)
    assert both.outcome == "backdoored"
    assert both.target is None
    assert both.families == ("patch", "text token", "pseudo-token")
    assert both.reasons[-1] == "no class stands out"
    accused = replace(image, outcome="backdoored", target=3, p_value=1e-4)
    assert with_text(accused, replace(text, outcome="no evidence")).target == 3


def test_drift_along_one_direction_is_concentrated() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 16, generator=generator)
    direction = torch.eye(16)[3]
    noise = torch.randn(200, 16, generator=generator)
    one = drift(reference + 0.1 * noise + torch.rand(200, 1, generator=generator) * 3 * direction, reference)
    many = drift(reference + 0.1 * noise, reference)
    assert one.concentration > 0.9 > 0.3 > many.concentration
    assert abs(float(one.direction @ direction)) > 0.99


def test_a_prompt_learner_is_examined_by_its_towers_and_not_against_themselves(classifier: Classifier) -> None:
    suspect = PromptedClassifier(classifier, learner("cocoop"))
    other = classifier.with_model(tiny_model(3), "other")
    assert without_prompts(suspect, None) == (classifier, None)
    assert without_prompts(suspect, other) == (classifier, other)
    assert without_prompts(suspect, PromptedClassifier(other, learner("coop")))[1] is other
    with pytest.raises(UsageError, match="nothing to compare in the text tower"):
        without_prompts(suspect, classifier.with_model(classifier.model, "the same"))
