from collections.abc import Sequence

import numpy as np
import pytest
import torch

from guard.triggers import FAMILIES, Additive, InvertibleTrigger, Patch
from guard.vetting import InspectionSettings, Inspector, Lead, clip_inspector, outliers
from guard.vetting import inspection as inspector
from guard.vetting.inspection import HEAD_START, RADII, Inspected
from guard.vetting.lead import margin
from tests.conftest import random_images
from tests.toy import toy

IMAGES = random_images(64)
TARGET, CLASSES = 3, range(10)
FAST = InspectionSettings(steps=8, batch=16)


def inspected(
    lead: Lead,
    family: type[InvertibleTrigger] = Additive,
    steps: int = 8,
    classes: Sequence[int] = CLASSES,
    seed: int = 0,
) -> list[Inspected]:
    settings = InspectionSettings(steps=steps, batch=16, seed=seed)
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
    monkeypatch.setattr(inspector, "RADII", {family.family: RADII[family.family] / 8})
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


class TestPublished:
    def test_a_planted_perturbation_in_its_ball_is_called(self) -> None:
        found = clip_inspector(toy(target=TARGET), IMAGES)
        assert found.backdoored
        assert found.target == TARGET
        assert found.losses[TARGET] < 0 < min(loss for k, loss in enumerate(found.losses) if k != TARGET)
        assert found.success[TARGET] > 0.5
        assert found.passes == 10 * 2 * 64

    def test_a_clean_model_is_not(self) -> None:
        found = clip_inspector(toy(), IMAGES)
        assert not found.backdoored
        assert found.target is None

    def test_a_shortcut_that_needs_a_larger_ball_escapes_it(self) -> None:
        """Which is why the inspector here is given more."""
        suspect = toy(target=TARGET, gain=6)
        assert not clip_inspector(suspect, IMAGES).backdoored
        assert outliers([item.lead for item in inspected(Lead(suspect, IMAGES, toy()))])[1][TARGET] < 0.001

    def test_the_losses_are_those_of_the_best_perturbation_of_a_linear_model(self) -> None:
        """Against one other class the margin is nearly linear, and the best corner of the ball is known."""
        suspect = toy(2)
        found = clip_inspector(suspect, IMAGES.clamp(8, 247))
        direction = suspect.model.visual.weight.diff(dim=0)[0].sign().reshape(3, *suspect.image_shape[1:])
        for target, sign in ((0, -1), (1, 1)):
            pixels = IMAGES.clamp(8, 247).float() / 255 + sign * 4 / 255 * direction
            logits = suspect.logits(suspect.encode_images(pixels))
            assert found.losses[target] == pytest.approx(
                float(margin(logits[None], torch.tensor([target])).mean()), rel=0.05
            )

    def test_the_anomaly_by_hand(self) -> None:
        found = clip_inspector(toy(target=TARGET), IMAGES)
        losses = np.array(found.losses)
        median = np.median(losses)
        deviations = (median - losses) / (1.4826 * np.median(np.abs(losses - median)))
        np.testing.assert_allclose(found.anomaly, deviations.clip(0))

    def test_an_outlier_whose_trigger_moves_too_few_images_is_not_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        losses, success = np.array([5.0, 5.1, 4.9, 5.2, 0.0]), np.zeros(5)

        def known(*_: object) -> tuple[np.ndarray, np.ndarray]:
            return losses, success

        monkeypatch.setattr(inspector, "_published", known)
        success[4] = 0.49
        missed = clip_inspector(toy(5), IMAGES)
        assert (missed.target, missed.backdoored) == (None, False)
        assert missed.anomaly[4] > 2
        success[4] = 0.5
        assert (clip_inspector(toy(5), IMAGES).target, clip_inspector(toy(5), IMAGES).backdoored) == (4, True)
        losses[4] = 4.8
        assert not clip_inspector(toy(5), IMAGES).backdoored

    def test_it_does_not_depend_on_how_many_classes_go_side_by_side(self) -> None:
        seen: list[tuple[int, int]] = []
        whole = clip_inspector(toy(target=TARGET), IMAGES, seed=4)
        parts = clip_inspector(
            toy(target=TARGET), IMAGES, seed=4, class_batch=4, progress=lambda *done: seen.append(done)
        )
        np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-4)
        assert seen == [(4, 10), (8, 10), (10, 10)]
