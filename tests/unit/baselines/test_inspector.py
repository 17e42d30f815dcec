import numpy as np
import pytest
import torch

from guard.baselines import clip_inspector, inspector
from guard.triggers import Additive
from guard.vetting import InspectionSettings, Inspector, Lead, outliers
from guard.vetting.lead import margin
from tests.conftest import random_images
from tests.toy import toy

IMAGES = random_images(64)
TARGET = 3


def test_a_planted_perturbation_in_its_ball_is_called() -> None:
    found = clip_inspector(toy(target=TARGET), IMAGES)
    assert found.backdoored
    assert found.target == TARGET
    assert found.losses[TARGET] < 0 < min(loss for k, loss in enumerate(found.losses) if k != TARGET)
    assert found.success[TARGET] > 0.5
    assert found.passes == 10 * 2 * 64


def test_a_larger_ball_has_stronger_perturbations() -> None:
    small, large = (clip_inspector(toy(target=TARGET), IMAGES, radius=radius / 255) for radius in (4, 12))
    assert all(more < less for more, less in zip(large.losses, small.losses, strict=True))


def test_a_clean_model_is_not() -> None:
    found = clip_inspector(toy(), IMAGES)
    assert not found.backdoored
    assert found.target is None


def test_a_shortcut_that_needs_a_larger_ball_escapes_it() -> None:
    """Which is why the inspector here is given more."""
    suspect = toy(target=TARGET, gain=6)
    assert not clip_inspector(suspect, IMAGES).backdoored
    settings = InspectionSettings(steps=8, batch=16)
    found = Inspector(Lead(suspect, IMAGES, toy()), Additive, torch.arange(10), settings).run(8, range(10))
    assert outliers([item.lead for item in found])[1][TARGET] < 0.001


def test_the_losses_are_those_of_the_best_perturbation_of_a_linear_model() -> None:
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


def test_the_anomaly_by_hand() -> None:
    found = clip_inspector(toy(target=TARGET), IMAGES)
    losses = np.array(found.losses)
    median = np.median(losses)
    deviations = (median - losses) / (1.4826 * np.median(np.abs(losses - median)))
    np.testing.assert_allclose(found.anomaly, deviations.clip(0))


def test_an_outlier_whose_trigger_moves_too_few_images_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, success = np.array([5.0, 5.1, 4.9, 5.2, 0.0]), np.zeros(5)

    def known(*_: object) -> tuple[np.ndarray, np.ndarray]:
        return losses, success

    monkeypatch.setattr(inspector, "_search", known)
    success[4] = 0.49
    missed = clip_inspector(toy(5), IMAGES)
    assert (missed.target, missed.backdoored) == (None, False)
    assert missed.anomaly[4] > 2
    success[4] = 0.5
    assert (clip_inspector(toy(5), IMAGES).target, clip_inspector(toy(5), IMAGES).backdoored) == (4, True)
    losses[4] = 4.8
    assert not clip_inspector(toy(5), IMAGES).backdoored


def test_it_does_not_depend_on_how_many_classes_go_side_by_side() -> None:
    seen: list[tuple[int, int]] = []
    whole = clip_inspector(toy(target=TARGET), IMAGES, seed=4)
    parts = clip_inspector(toy(target=TARGET), IMAGES, seed=4, class_batch=4, progress=lambda *done: seen.append(done))
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-4)
    assert seen == [(4, 10), (8, 10), (10, 10)]
