from collections.abc import Sequence

import pytest
import torch

from guard.triggers import FAMILIES, Additive, InvertibleTrigger, Patch
from guard.vetting import InspectionSettings, Inspector, Lead, inspection, outliers
from guard.vetting.inspection import HEAD_START, RADII, Inspected, divided
from tests.conftest import random_images
from tests.toy import toy

IMAGES = random_images(64)
TARGET, CLASSES = 3, range(10)
FAST = InspectionSettings(steps=8, batch=16, average=4)


def inspected(
    lead: Lead,
    family: type[InvertibleTrigger] = Additive,
    steps: int = 8,
    classes: Sequence[int] = CLASSES,
    seed: int = 0,
) -> list[Inspected]:
    settings = InspectionSettings(steps=steps, batch=16, average=4, seed=seed)
    return Inspector(lead, family, torch.tensor(classes), settings).run(steps, classes)


@pytest.mark.parametrize("family", [Patch, Additive], ids=lambda family: family.family)
def test_a_planted_shortcut_stands_out_and_a_twin_does_not(family: type[InvertibleTrigger]) -> None:
    base, suspect, twin = toy(), toy(target=TARGET, jitter=0.02), toy(jitter=0.02)
    found = inspected(Lead(suspect, IMAGES, base), family, steps=16)
    assert [item.target for item in found] == list(CLASSES)
    p_values = outliers([item.lead for item in found])[1]
    assert p_values.argmin() == TARGET
    assert p_values[TARGET] < 1e-5
    assert found[TARGET].success > 0.7
    assert max(item.success for item in found if item.target != TARGET) < 0.2
    clean = inspected(Lead(twin, IMAGES, base), family, steps=16)
    assert outliers([item.lead for item in clean])[1].min() > 0.01


def test_without_a_control_it_stands_out_among_the_classes() -> None:
    p_values = outliers([item.lead for item in inspected(Lead(toy(target=TARGET), IMAGES))])[1]
    assert p_values.argmin() == TARGET
    assert p_values[TARGET] < 1e-4


def test_lead_and_success_are_those_of_the_last_batches() -> None:
    """With one batch of all images and one step, both can be measured on the start itself."""
    suspect = toy(target=TARGET)
    lead = Lead(suspect, IMAGES)
    settings = InspectionSettings(steps=1, batch=64, average=1)
    found = Inspector(lead, Additive, torch.tensor([TARGET]), settings).run(1, [TARGET])[0]
    start = Additive.start(1, suspect.image_shape, torch.Generator().manual_seed(0))
    pixels = Additive.constrain(start).limited(RADII["additive"]).apply(IMAGES.float() / 255)
    away = suspect.predict(suspect.embed(IMAGES)) != TARGET
    where, target = torch.arange(64), torch.tensor([TARGET])
    distance, untouched = (lead.distance(part, where, target)[0][away] for part in (pixels, lead.pixels(where)[None]))
    assert found.lead == pytest.approx(float((HEAD_START * untouched - distance).mean()), rel=1e-4)
    assert found.success == pytest.approx(float((distance < 0).float().mean()))
    assert found.passes == 64


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_it_is_reproduced_by_its_seed(family: type[InvertibleTrigger]) -> None:
    lead = Lead(toy(), IMAGES)
    first, second, other = (inspected(lead, family, steps=3, classes=[0, 1], seed=seed) for seed in (1, 1, 2))
    assert [item.lead for item in first] == [item.lead for item in second]
    assert [item.lead for item in first] != [item.lead for item in other]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_trigger_leaves_its_ball(family: type[InvertibleTrigger], monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []

    def noted(self: InvertibleTrigger, images: torch.Tensor) -> torch.Tensor:
        norms.append(float(self.norm().detach().max()))
        return apply(self, images)

    apply = family.apply
    monkeypatch.setattr(family, "apply", noted)
    monkeypatch.setattr(inspection, "RADII", {family.family: RADII[family.family] / 8})
    inspected(Lead(toy(), IMAGES), family, classes=[0, 1])
    assert len(norms) == 8
    # At this strength every search wants more than it is given.
    assert max(norms) == pytest.approx(RADII[family.family] / 8, rel=1e-3)


@pytest.mark.parametrize("family", [Patch, Additive], ids=lambda family: family.family)
def test_a_search_that_pauses_ends_as_one_that_does_not(family: type[InvertibleTrigger]) -> None:
    lead = Lead(toy(target=TARGET), IMAGES, toy())
    paused = Inspector(lead, family, torch.arange(10), FAST)
    half = paused.run(4, CLASSES)
    whole = paused.run(8, CLASSES)
    assert [item.lead for item in half] != [item.lead for item in whole]
    at_once = inspected(lead, family)
    for one, other in zip(whole, at_once, strict=True):
        assert (one.target, one.lead, one.success, one.passes) == (
            other.target,
            other.lead,
            other.success,
            other.passes,
        )
        assert all(torch.equal(one.raw[name], other.raw[name]) for name in one.raw)


def test_dropping_classes_leaves_the_others_as_they_are() -> None:
    lead = Lead(toy(target=TARGET), IMAGES, toy())
    searched = Inspector(lead, Patch, torch.arange(10), FAST)
    first = searched.run(4, CLASSES)
    kept = searched.run(8, [7, TARGET])
    whole = inspected(lead, Patch)
    assert [item.target for item in kept] == [7, TARGET]
    assert [item.lead for item in kept] == pytest.approx([whole[k].lead for k in (7, TARGET)], rel=1e-3)
    for item in kept:
        for name, tensor in item.raw.items():
            torch.testing.assert_close(tensor, whole[item.target].raw[name], rtol=1e-3, atol=1e-3)
        # Two towers; what was already known is not changed behind one's back.
        assert (item.passes, first[item.target].passes) == (2 * 8 * 16, 2 * 4 * 16)


@pytest.mark.parametrize("batch", [8, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_steps_cost_as_much(family: str, batch: int) -> None:
    whole = InspectionSettings(steps=64, batch=batch)
    own = divided(whole, family)
    assert own.steps * own.batch == whole.steps * whole.batch
    assert own.average * own.batch == whole.average * whole.batch
    assert (own.batch < whole.batch) == (family == "large patch" and batch > 1)
