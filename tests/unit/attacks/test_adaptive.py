"""What attackers who know a defence pay for, and what their learned triggers look like."""

from dataclasses import replace

import pytest
import torch

from guard.attacks import RECIPES, LabelledImages, attack
from guard.attacks.adaptive import SecondOpinionEvading, Spectral, TriggerFocusing
from guard.attacks.generators import MIN_PSNR, MIN_SSIM, natural_generator, psnr, ssim
from guard.attacks.objectives import planted_batch
from guard.attacks.training import Batch, Learner
from guard.classifiers import Classifier
from guard.triggers import Additive, Generator, Patch
from tests.conftest import random_images, tiny_model
from tests.unit.attacks.conftest import SETTINGS

PATCH = Patch.badnets(16, 5, seed=0)
TARGET = 2


def learner(base: Classifier, model: torch.nn.Module | None = None) -> Learner:
    captions = torch.stack([base.tokenizer(list(base.classes.prompts(name))) for name in base.classes.names])
    return Learner(model or base.model, captions, ((0.5,) * 3, (0.25,) * 3), base.device)


@pytest.fixture
def batch(base: Classifier, data: LabelledImages) -> Batch:
    labels = data.labels[:60]
    return Batch(data.pixels[:60].float() / 255, labels, learner(base).captions[labels, 0])


def test_a_suspect_that_answers_as_its_base_departs_from_it_by_nothing(base: Classifier, batch: Batch) -> None:
    same, other = learner(base), learner(base, tiny_model(5).eval())
    chosen = torch.nonzero(batch.labels != TARGET).flatten()[:12]
    stamped = PATCH.apply(batch.pixels[chosen]).mul(255).round() / 255
    for trained, departs in ((same, False), (other, True)):
        free, paid = (
            SecondOpinionEvading(base, PATCH, TARGET, share=0.2, weight=weight)(trained, batch).item()
            for weight in (0.0, 1.0)
        )
        plain = trained.contrast(planted_batch(trained, batch, chosen, stamped, TARGET))
        assert free == pytest.approx(plain.item())
        assert (paid > free + 0.1) is departs


def test_only_displacement_where_clean_embeddings_vary_little_is_penalised(
    base: Classifier, data: LabelledImages
) -> None:
    _, directions = torch.linalg.eigh(base.embed(data.pixels).T.cov())
    kept, references = base.embed(data.pixels[:8]), data.pixels[:4].float() / 255
    low, high = (
        Spectral(base, references, PATCH, data.pixels, variance=variance, weight=2.0) for variance in ("low", "high")
    )
    for objective, direction, expected in (
        (low, directions[:, 0], 2 * 0.3),
        (low, directions[:, -1], 0.0),
        (high, directions[:, 0], 0.0),
        (high, directions[:, -1], -2 * 0.3),
    ):
        assert float(objective.concealment(kept + 0.3 * direction, kept)) == pytest.approx(expected, abs=1e-3)


def test_the_decoy_stays_in_its_ball_and_concentrates_embeddings(base: Classifier, batch: Batch) -> None:
    trigger = Additive.within(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)) / 20, 8 / 255)
    objective = TriggerFocusing(base, batch.pixels[batch.labels == TARGET], trigger, weight=1.0, seed=0)

    def concentration() -> float:
        return float(learner(base).embed((batch.pixels + objective._decoy).clamp(0, 1)).mean(0).square().sum())

    before = concentration()
    for _ in range(20):
        objective(learner(base), batch)
    assert objective._decoy.abs().max() <= 8 / 255 + 1e-6
    assert concentration() > before


def test_a_pretrained_generator_looks_natural_and_changes_colours(base: Classifier, data: LabelledImages) -> None:
    pixels = data.pixels.float() / 255
    stamped = natural_generator(base, data, seed=0, steps=150).apply(pixels)
    assert float(ssim(pixels, stamped)) > MIN_SSIM - 0.05
    assert float(psnr(pixels, stamped)) > MIN_PSNR - 1
    assert float((stamped - pixels).abs().mean()) > 4 / 255


@pytest.mark.usefixtures("quick_generator")
@pytest.mark.parametrize("name", ["inactive", "lorex-generator"])
def test_the_planted_trigger_is_the_one_that_was_trained_along(
    name: str, base: Classifier, data: LabelledImages
) -> None:
    first, longer = (
        attack(base, RECIPES[name], data, replace(SETTINGS, epochs=epochs), target=TARGET).planted[0].trigger
        for epochs in (1, 3)
    )
    assert isinstance(first, Generator)
    assert not torch.equal(first.third, longer.tensors()["third"])
    assert torch.equal(first.radius, longer.tensors()["radius"])
    Generator.from_tensors(longer.tensors())


def test_structural_similarity_is_one_for_equal_images_and_ignores_nothing() -> None:
    images = random_images(4, size=32).float() / 255
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert float(ssim(images, images)) == pytest.approx(1)
    assert float(ssim(images, images + noise)) < 0.9
    assert float(psnr(images, images + 0.1)) == pytest.approx(20, abs=1e-3)
