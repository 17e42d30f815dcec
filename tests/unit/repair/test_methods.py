"""Each method on a backdoor that is planted by hand."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guard.classifiers import ClassList
from guard.classifiers.prompts import PromptedClassifier, PromptLearner
from guard.errors import UsageError
from guard.repair import (
    Case,
    Guided,
    Images,
    Method,
    PerturbRecover,
    Realign,
    Subtract,
    Switch,
    TuningSettings,
    measure,
    repair,
)
from guard.repair.perturb_recover import augmented
from guard.repair.realign import realigned
from guard.repair.stamping import mixed
from guard.repair.switch import halfway
from guard.vetting import Verdict
from tests.conftest import CLASSES
from tests.unit.repair.conftest import Backdoored

QUICK = TuningSettings(steps=60, batch=32, learning_rate=2e-3, weight_decay=0.0)
METHODS: dict[str, Method] = {
    "realign": Realign(tuning=QUICK),
    "guided": Guided(tuning=QUICK),
    "switch": Switch(),
}


@pytest.mark.parametrize(
    ("name", "with_base", "left"),
    [("realign", True, 0.1), ("realign", False, 0.1), ("guided", True, 0.1), ("guided", False, 0.1),
     ("switch", True, 0.4)],
)  # fmt: skip
def test_the_trigger_loses_its_effect_and_the_suspect_is_not_changed(
    name: str, left: float, backdoored: Backdoored, *, with_base: bool
) -> None:
    method = METHODS[name]
    case = backdoored.case if with_base else replace(backdoored.case, base=None)
    digest = case.suspect.digest.root
    before = measure(case.suspect, case.held_out, case.triggers)
    found = next(method.candidates(case)).classifier
    after = measure(found, case.held_out, case.triggers)
    assert before.success["patch-2"] > 0.9
    assert after.success["patch-2"] < left
    assert after.accuracy is not None
    assert before.accuracy is not None
    assert after.accuracy > before.accuracy - 0.05
    assert case.suspect.digest.root == digest == case.copy("unchanged").digest.root
    assert not any(each.requires_grad for each in found.model.parameters())


def test_subtract_offers_the_steps_that_keep_the_answers_the_least_effective_trigger_first(
    backdoored: Backdoored,
) -> None:
    case, method = backdoored.case, Subtract(tuning=replace(QUICK, steps=5), allowed=0.05)
    offered = list(method.candidates(case))
    measured = [measure(each.classifier, case.held_out, case.triggers) for each in offered]
    before = measure(case.suspect, case.held_out, ()).accuracy
    assert 1 <= len(offered) <= 3
    assert {each.choices["alpha"] for each in offered} <= set(method.alphas)
    assert before is not None
    assert all(each.accuracy is not None and each.accuracy >= before - 0.05 for each in measured)
    success = [round(each.success["patch-2"], 2) for each in measured]
    assert success == sorted(success)


@pytest.mark.parametrize("name", ["realign", "guided"])
def test_equal_seeds_give_equal_weights(name: str, backdoored: Backdoored) -> None:
    method: Method = replace(METHODS[name], tuning=replace(QUICK, steps=3))  # type: ignore[type-var]
    digests = {next(method.candidates(replace(backdoored.case, seed=seed))).classifier.digest.root for seed in (0, 0)}
    other = next(method.candidates(replace(backdoored.case, seed=1))).classifier.digest.root
    assert len(digests) == 1
    assert other not in digests


def test_training_starts_with_modules_of_a_base_that_fits_and_otherwise_from_the_suspect(
    backdoored: Backdoored,
) -> None:
    case = backdoored.case
    assert case.base is not None
    start = halfway(case, "changed")
    models = case.suspect, start.classifier
    before, now = (measure(each, case.held_out, case.triggers).success["patch-2"] for each in models)
    assert start.from_base
    assert now < before / 2
    other = copy.deepcopy(case.base.model)
    other.visual = torch.nn.Linear(2, 2)
    for base in (None, case.base.with_model(other, "another architecture")):
        start = halfway(replace(case, base=base), "changed")
        assert not start.from_base
        assert start.classifier.digest.root == case.suspect.digest.root


def test_a_mixture_is_at_least_half_its_own_image() -> None:
    pixels = torch.arange(64.0)[:, None, None, None].expand(-1, 3, 4, 4) % 2
    distance = (mixed(pixels, torch.Generator().manual_seed(0)) - pixels).abs().amax((1, 2, 3))
    assert 0.3 < float(distance.max()) <= 0.5


def test_guided_needs_no_labels(backdoored: Backdoored) -> None:
    case = backdoored.case
    plain = replace(case, images=Images(case.images.pixels))
    found = next(METHODS["guided"].candidates(plain)).classifier
    assert measure(found, case.held_out, case.triggers).success["patch-2"] < 0.2


def test_clean_images_alone_do_not_remove_the_trigger(backdoored: Backdoored) -> None:
    case = replace(backdoored.case, base=None)
    found = realigned(case, case.needs_labels("realign"), (), Realign(alone=1.0, tuning=QUICK)).classifier
    assert measure(found, case.held_out, case.triggers).success["patch-2"] > 0.9


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (Realign(), {"triggers": ()}, "needs a reconstructed trigger"),
        (Guided(), {"triggers": ()}, "needs a reconstructed trigger"),
        (Subtract(), {"triggers": ()}, "needs a reconstructed trigger"),
        (Switch(), {"base": None}, "needs the base model"),
        (Realign(), {"labels": None}, "needs labelled images"),
        (PerturbRecover(), {"labels": None}, "needs labelled images"),
    ],
)
def test_what_a_method_lacks_is_said(
    method: Method, change: dict[str, object], message: str, backdoored: Backdoored
) -> None:
    case: Case = backdoored.case
    changed = {"images": Images(case.images.pixels)} if "labels" in change else change
    case = replace(case, **changed)
    with pytest.raises(UsageError, match=message):
        next(method.candidates(case))


def test_realign_tunes_the_prompts_and_not_the_towers_of_a_prompt_learner(
    backdoored: Backdoored, tmp_path: Path
) -> None:
    learner = PromptLearner({"ctx": 0.1 * torch.ones(2, 16)})
    suspect = PromptedClassifier(backdoored.base, learner)
    case = replace(backdoored.case, suspect=suspect)
    contexts = [learner.tensors["ctx"]]
    for each in Realign(new_prompts=replace(QUICK, steps=5)).candidates(replace(case, store=tmp_path)):
        found = each.classifier
        assert isinstance(found, PromptedClassifier)
        assert found.towers is backdoored.base
        assert found.learner.tensors.keys() == learner.tensors.keys()
        contexts.append(found.learner.tensors["ctx"])
    assert len({str(each.tolist()) for each in contexts}) == 3
    with pytest.raises(UsageError, match="repaired by realign"):
        repair(suspect, Guided(), backdoored.images, verdict=Verdict("backdoored", 1, 0.0, (), 0.01, ()))


def test_new_prompts_need_no_trigger_and_nothing_of_the_old_ones(backdoored: Backdoored) -> None:
    method, contexts = Realign(new_prompts=replace(QUICK, steps=5)), []
    for value in (0.1, 0.9):
        suspect = PromptedClassifier(backdoored.base, PromptLearner({"ctx": value * torch.ones(2, 16)}))
        case = replace(backdoored.case, suspect=suspect, triggers=())
        (candidate,) = method.candidates(case)
        found = candidate.classifier
        assert isinstance(found, PromptedClassifier)
        contexts.append(found.learner.tensors["ctx"])
        with pytest.raises(UsageError, match="needs a reconstructed trigger"):
            next(replace(method, anew=False).candidates(case))
    assert torch.equal(*contexts)


class TestPerturbRecover:
    def test_pushes_embeddings_away_and_keeps_answers(self, backdoored: Backdoored) -> None:
        tuning = replace(PerturbRecover().tuning, steps=60, batch=64, learning_rate=2e-3)
        case = backdoored.case
        found = next(PerturbRecover(tuning=tuning).candidates(case)).classifier
        old, new = (each.embed(case.held_out.pixels) for each in (case.suspect, found))
        assert float((old * new).sum(1).mean()) < 0.9
        after = measure(found, case.held_out, ()).accuracy
        assert after is not None
        assert after > 0.7

    def test_a_distance_beyond_tau_pushes_no_further(self, backdoored: Backdoored) -> None:
        case = backdoored.case
        tuning = replace(PerturbRecover().tuning, steps=10, batch=32, learning_rate=5e-3)
        near, far = (
            next(PerturbRecover(tau=tau, tuning=tuning).candidates(case)).classifier.embed(case.held_out.pixels)
            for tau in (0.0, 2.15)
        )
        old = case.suspect.embed(case.held_out.pixels)
        assert float((near * old).sum(1).mean()) > float((far * old).sum(1).mean())

    def test_captions_take_the_place_of_labels(self, backdoored: Backdoored) -> None:
        # With one template for each class, the captions are those that are made of the labels.
        suspect = copy.copy(backdoored.suspect)
        suspect.classes = ClassList(CLASSES.names, ("a {}.",))
        case = replace(backdoored.case, suspect=suspect)
        captions = tuple(f"a {CLASSES.names[label]}." for label in case.needs_labels("").tolist())
        paired = replace(case, images=Images(case.images.pixels, captions=captions))
        method = PerturbRecover(tuning=replace(PerturbRecover().tuning, steps=3, batch=32, learning_rate=5e-3))
        labelled, captioned = (next(method.candidates(each)).classifier.embed(case.held_out.pixels[:20])
                               for each in (case, paired))  # fmt: skip
        assert torch.allclose(labelled, captioned, atol=1e-5)

    def test_released_noise_only_brightens(self) -> None:
        pixels = torch.full((64, 3, 20, 20), 0.5)
        released, centred = (
            augmented(pixels, (0.5,) * 3, torch.Generator().manual_seed(0), noise)
            for noise in ("released", "zero-mean")
        )
        assert float(released.min()) == pytest.approx(0.5)
        assert float(centred.min()) < 0.3
        assert 0.3 < float((released.flatten(1).amax(1) > 0.5).float().mean()) < 0.7
