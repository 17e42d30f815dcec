from dataclasses import replace

import pytest
import torch

from guard.classifiers import Classifier
from guard.triggers import FAMILIES, Additive, InvertibleTrigger, Patch
from guard.vetting import InspectionSettings, Inspector, Lead, SearchSettings, effect, reconstruct
from tests.conftest import random_images
from tests.toy import checkerboard, toy

IMAGES, HELD_OUT = random_images(64), random_images(50, seed=7)
TARGET = 3
FAST = SearchSettings(steps=40, batch=16, stall=20)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_it_is_reproducible_and_measured_on_other_images(
    classifier: Classifier, images: torch.Tensor, family: type[InvertibleTrigger]
) -> None:
    quick = replace(FAST, steps=4)
    first, second = (
        reconstruct(Lead(classifier, IMAGES), family, images[:50], torch.arange(3), quick) for _ in range(2)
    )
    assert [item.target for item in first] == [0, 1, 2]
    assert [item.norm for item in first] == [item.norm for item in second]
    for item in first:
        measured = effect(classifier, item.trigger.stamp, item.target, images[:50])
        assert item.success == measured.success
        assert item.reference_success is None
        assert item.norm == pytest.approx(float(item.trigger.norm()), rel=1e-4)
        assert item.passes == 4 * 16 + measured.passes


def test_a_planted_shortcut_needs_the_smallest_perturbation_and_is_what_was_planted() -> None:
    found = reconstruct(Lead(toy(target=TARGET), IMAGES), Additive, HELD_OUT, torch.arange(5), replace(FAST, steps=80))
    planted = found[TARGET]
    assert planted.reached
    assert planted.success > 0.8
    assert all(item.norm > 3 * planted.norm for item in found if item.reached and item is not planted)
    assert isinstance(planted.trigger, Additive)
    delta = planted.trigger.delta
    assert float((delta * checkerboard()).mean() / delta.abs().mean()) > 0.7


def test_success_on_the_reference_model_is_measured_there() -> None:
    suspect, base = toy(target=TARGET), toy(jitter=0.05)
    lead = Lead(suspect, IMAGES, base)
    (found,) = reconstruct(lead, Patch, HELD_OUT, torch.tensor([TARGET]), replace(FAST, steps=20))
    there = effect(base, found.trigger.stamp, TARGET, HELD_OUT)
    assert found.reference_success == there.success
    assert found.success == effect(suspect, found.trigger.stamp, TARGET, HELD_OUT).success
    assert found.success > 0.8 > found.reference_success


def test_it_starts_where_it_is_told() -> None:
    suspect = toy(target=TARGET)
    settings = InspectionSettings(steps=8, batch=16)
    lead = Lead(suspect, IMAGES)
    (inspected,) = Inspector(lead, Additive, torch.tensor([TARGET]), settings).run(8, [TARGET])
    start = {name: tensor[None] for name, tensor in inspected.raw.items()}
    before = {name: tensor.clone() for name, tensor in start.items()}
    none = replace(FAST, steps=0)
    (found,) = reconstruct(lead, Additive, HELD_OUT, torch.tensor([TARGET]), none, start=start)
    assert torch.equal(found.trigger.tensors()["delta"], Additive.constrain(start)[0].delta)
    assert not found.reached
    # A few steps from there do what they do not do from nowhere.
    few = replace(FAST, steps=4)
    (warm,) = reconstruct(lead, Additive, HELD_OUT, torch.tensor([TARGET]), few, start=start)
    (cold,) = reconstruct(lead, Additive, HELD_OUT, torch.tensor([TARGET]), few)
    assert warm.norm < cold.norm
    assert warm.success >= cold.success
    assert all(torch.equal(start[name], before[name]) for name in start)


def test_a_class_out_of_reach_is_not_called_reached() -> None:
    """Class 2 lies between two others, so that one of them always wins."""
    model = toy(5)
    weight = model.model.visual.weight.data
    weight[2] = (weight[0] + weight[1]) / 2
    (found,) = reconstruct(Lead(model, IMAGES), Additive, HELD_OUT, torch.tensor([2]), FAST)
    assert (found.success, found.reached) == (0, False)


class TestEffect:
    def test_by_hand(self) -> None:
        model = toy(target=TARGET)
        trigger = Additive(0.05 * checkerboard().expand(3, -1, -1))
        elsewhere = HELD_OUT[model.predict(model.embed(HELD_OUT)) != TARGET]
        logits = model.logits(model.embed(trigger.stamp(elsewhere)))
        found = effect(model, trigger.stamp, TARGET, HELD_OUT)
        assert found.success == pytest.approx(float((logits.argmax(1) == TARGET).float().mean()))
        assert found.passes == len(HELD_OUT) + len(elsewhere)

    def test_images_that_are_all_of_the_class_show_nothing(self) -> None:
        model = toy()
        own = HELD_OUT[model.predict(model.embed(HELD_OUT)) == 0]
        assert len(own)
        assert effect(model, Additive(torch.zeros(3, 16, 16)).stamp, 0, own).success == 0
