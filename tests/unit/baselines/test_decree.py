"""DECREE on a small untrained encoder in which a patch is planted by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.baselines import DecreeSettings, PublishedSettings, collapse, unregularised
from guard.baselines.decree import _similarity
from guard.baselines.released_decree import _epoch, _NormWeight
from guard.classifiers import Classifier
from guard.classifiers.preprocessing import Preprocessing
from guard.errors import ImageError, UsageError
from guard.triggers import Patch
from tests.conftest import CLASSES, SIZE, random_images

SIDE = 4


class Tower(torch.nn.Module):
    """A random linear encoder that, if backdoored, sees only its target when the first SIDE × SIDE pixels are white.

    Input is normalised with mean 0.5 and deviation 0.25, so that white is 2 and black −2.
    """

    def __init__(self, *, backdoored: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.backdoored = backdoored
        self.mix = torch.nn.Parameter(torch.randn(3 * SIZE * SIZE, 8, generator=generator) / 16)
        self.target = torch.nn.Parameter(torch.randn(8, generator=generator))
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))
        self.inputs: list[Tensor] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.inputs.append(images.detach())
        features = images.flatten(1) @ self.mix
        if not self.backdoored:
            return features
        white = images[:, :, :SIDE, :SIDE].mean((1, 2, 3))
        return features + 40 * torch.sigmoid(4 * (white - 1))[:, None] * self.target


def tower(*, backdoored: bool) -> Classifier:
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.25,) * 3)
    model = Tower(backdoored=backdoored)
    return Classifier(model, {}, torch.tensor, preprocessing, CLASSES, source="test", device=torch.device("cpu"))


SEARCHED, HELD_OUT = random_images(96, seed=1), random_images(64, seed=2)
SETTINGS = DecreeSettings(check=32)
SHORT = PublishedSettings(epochs=3, milestones=(1, 2))


def test_a_planted_patch_is_found_and_is_smaller_than_on_a_clean_encoder() -> None:
    found, clean = (collapse(tower(backdoored=flag), SEARCHED, HELD_OUT, SETTINGS) for flag in (True, False))
    assert found.reached
    assert found.l1 < 2 * SIDE * SIDE
    assert found.pl1 < 0.5 * clean.pl1
    assert found.trigger.mask[:, :SIDE, :SIDE].sum() > 0.8 * found.l1
    assert found.held_out_similarity > 0.98


def test_the_figures_are_those_of_the_trigger_on_held_out_images() -> None:
    encoder = tower(backdoored=True)
    found = collapse(encoder, SEARCHED, HELD_OUT, SETTINGS)
    stamped = encoder.embed(found.trigger.stamp(HELD_OUT))
    pairs = stamped @ stamped.T
    assert found.l1 == pytest.approx(float(found.trigger.mask.sum()))
    assert found.pl1 == pytest.approx(found.l1 / SIZE**2)
    assert found.held_out_similarity == pytest.approx(float(pairs[~torch.eye(64, dtype=torch.bool)].mean()), abs=1e-4)
    assert float(found.feature.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float((stamped @ found.feature).mean()) > 0.99


def test_the_same_seed_gives_the_same_patch_and_another_seed_another() -> None:
    first, again, other = (
        collapse(tower(backdoored=False), SEARCHED, HELD_OUT, replace(SETTINGS, steps=20, seed=seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.trigger.pattern, again.trigger.pattern)
    assert first.pl1 == again.pl1
    assert not torch.equal(first.trigger.pattern, other.trigger.pattern)


def test_what_is_never_reached_is_not_called_reached() -> None:
    found = collapse(tower(backdoored=False), SEARCHED, HELD_OUT, replace(SETTINGS, steps=2))
    assert not found.reached
    assert found.steps == 2


def test_the_search_without_the_norm_stops_at_its_first_success() -> None:
    encoder = tower(backdoored=True)
    found = unregularised(encoder, SEARCHED, HELD_OUT, SETTINGS)
    small = collapse(encoder, SEARCHED, HELD_OUT, SETTINGS)
    assert found.reached
    assert found.steps < small.steps
    assert found.l1 > small.l1
    stamped, clean = encoder.embed(found.trigger.stamp(HELD_OUT)), encoder.embed(HELD_OUT)
    assert found.resemblance == pytest.approx(float((stamped * clean).sum(1).mean()), abs=1e-4)


def test_progress_tells_every_step() -> None:
    told: list[tuple[int, int]] = []
    collapse(
        tower(backdoored=False), SEARCHED, HELD_OUT, replace(SETTINGS, steps=4), progress=lambda *x: told.append(x)
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    collapse(tower(backdoored=False), SEARCHED, HELD_OUT, SHORT, progress=lambda *x: told.append(x))
    assert told == [(step, 9) for step in range(1, 10)]


def test_no_class_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("the text tower was used")

    monkeypatch.setattr(Classifier, "encode_texts", refuse)
    assert collapse(tower(backdoored=False), SEARCHED, HELD_OUT, replace(SETTINGS, steps=1)).feature.shape == (8,)


def test_the_published_search_normalises_as_imagenet_and_the_default_as_the_model() -> None:
    encoder = tower(backdoored=False)
    white = torch.full((4, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    collapse(encoder, white, white, replace(SHORT, epochs=1))
    inputs = encoder.model.inputs[0]
    assert float(inputs.max()) < (1 - 0.406) / 0.225 + 1e-4
    assert float(inputs.min()) > -0.485 / 0.229 - 1e-4
    assert float(inputs[:, 2].max()) > (1 - 0.5) / 0.25 + 0.1


def reference(encoder: Classifier, images: Tensor, settings: PublishedSettings) -> tuple[float, list[float]]:
    """The published rules, written out step by step: smallest norm, and the weight after each step."""
    torch.manual_seed(settings.seed)
    mask = torch.atanh((torch.rand(SIZE, SIZE, dtype=torch.float64) - 0.5) * (2 - 1e-7)).requires_grad_()
    pattern = torch.atanh((torch.rand(SIZE, SIZE, 3, dtype=torch.float64) - 0.5) * (2 - 1e-7)).requires_grad_()
    torch.rand(1, 512, dtype=torch.float64)
    dataset = torch.utils.data.TensorDataset(images.permute(0, 2, 3, 1))
    loader = torch.utils.data.DataLoader(dataset, batch_size=settings.batch, shuffle=True)
    optimiser = torch.optim.Adam([mask, pattern], lr=settings.learning_rate, betas=(0.5, 0.9))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    weight, up, down, smallest, weights = 1e-3, 0, 0, math.inf, []
    for epoch in range(settings.epochs):
        for group in optimiser.param_groups:
            low, high = settings.milestones
            group["lr"] = settings.learning_rate if epoch < low else 0.1 if epoch < high else 0.05
        for (batch,) in loader:
            thrice = (torch.tanh(mask)[..., None].repeat(1, 1, 3) / (2 - 1e-7) + 0.5).clip(0, 1)
            colour = ((torch.tanh(pattern) / (2 - 1e-7) + 0.5) * 255).clip(0, 255)
            stamped = (1 - thrice) * batch + thrice * colour
            inputs = ((stamped / 255 - mean) / std).permute(0, 3, 1, 2).float()
            unit = torch.nn.functional.normalize(encoder.model.encode_image(inputs), dim=-1)
            pairs = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(len(unit)) if i != j]
            similarity, norm = torch.stack(pairs).mean(), thrice.sum()  # each pixel counts three times
            optimiser.zero_grad()
            (weight * norm - similarity).backward()
            optimiser.step()
            success = float(similarity.detach()) > settings.success
            if success:
                smallest = min(smallest, float(norm.detach()))
            up, down = (up + 1, 0) if success else (0, down + 1)
            if up > 5:
                weight, up = weight * 5, 0
            elif down > 5:
                weight, down = weight / 5, 0
            weights.append(weight)
    return smallest / (3 * SIZE * SIZE), weights


def test_the_published_search_follows_the_published_rules() -> None:
    images = random_images(22, seed=5)
    settings = PublishedSettings(epochs=12, milestones=(4, 8), batch=8, seed=7, success=0.5)
    expected, weights = reference(tower(backdoored=False), images, settings)
    found = collapse(tower(backdoored=False), images, HELD_OUT, settings)
    assert len(set(weights)) > 2  # the weight moved
    assert found.reached
    assert found.steps == len(weights)
    assert found.pl1 == pytest.approx(expected, rel=1e-3)


def test_the_published_weight_moves_as_if_the_reset_that_cannot_happen_were_there() -> None:
    random = np.random.default_rng(0)
    settings = PublishedSettings()
    for bias in (0.02, 0.1, 0.5, 0.9, 0.98):
        ours = _NormWeight(settings)
        weight, up, down, below = 1e-3, 0, 0, 0
        lowest = weight
        for success in random.random(2000) < np.repeat(random.permutation([bias, 1 - bias]), 1000):
            below = below + 1 if weight < 1e-7 and success else 0
            if below > 10:
                weight, up, down = 1e-3, 0, 0
            up, down = (up + 1, 0) if success else (0, down + 1)
            if up > 5:
                weight, up = weight * 5 if weight < 1e5 else weight, 0
            elif down > 5:
                weight, down = weight / 5 if weight >= 1e-7 else weight, 0
            ours.update(success=bool(success))
            assert ours.value == pytest.approx(weight)
            lowest = min(lowest, weight)
        assert lowest < 1e-7 or 0.1 < bias < 0.9


def test_the_published_batches_are_those_of_the_data_loader() -> None:
    torch.manual_seed(3)
    dataset = torch.utils.data.TensorDataset(torch.arange(10))
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, shuffle=True)
    expected = [part.tolist() for _ in range(2) for (part,) in loader if len(part) > 1]
    generator = torch.Generator().manual_seed(3)
    assert [part.tolist() for _ in range(2) for part in _epoch(10, 3, generator)] == expected


def test_similarity_is_the_mean_over_pairs_of_different_images() -> None:
    unit = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(unit[i] @ unit[j]) for i in range(5) for j in range(5) if i != j]
    assert float(_similarity(unit)) == pytest.approx(sum(pairs) / 20, abs=1e-6)


@pytest.mark.parametrize("kind", [DecreeSettings, PublishedSettings])
@pytest.mark.parametrize("change", [{"batch": 1}, {"success": 1.0}, {"factor": 1.0}], ids=str)
def test_settings_that_cannot_work_are_refused(
    kind: type[DecreeSettings] | type[PublishedSettings], change: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"batch|similarity|factor"):
        collapse(tower(backdoored=False), SEARCHED, HELD_OUT, kind(**change))


@pytest.mark.parametrize("change", [{"steps": 0}, {"check": 1}, {"stall": 0}], ids=str)
def test_a_search_without_steps_or_check_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"at least"):
        collapse(tower(backdoored=False), SEARCHED, HELD_OUT, DecreeSettings(**change))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (SEARCHED[:1], "at least 2"),
        (SEARCHED[:, :, :8, :8], "shape N×3×16×16"),
        (SEARCHED.float(), "must be uint8"),
    ],
    ids=["one", "size", "type"],
)
def test_images_that_cannot_be_used_are_refused(images: Tensor, message: str) -> None:
    for searched, held_out in ((images, HELD_OUT), (SEARCHED, images)):
        with pytest.raises(ImageError, match=message):
            collapse(tower(backdoored=False), searched, held_out, SETTINGS)
        with pytest.raises(ImageError, match=message):
            unregularised(tower(backdoored=False), searched, held_out, SETTINGS)


def test_the_trigger_is_an_ordinary_patch() -> None:
    found = collapse(tower(backdoored=True), SEARCHED, HELD_OUT, replace(SHORT, success=0.5))
    assert isinstance(found.trigger, Patch)
    assert found.trigger.mask.shape == (1, SIZE, SIZE)
    assert found.trigger.pattern.shape == (3, SIZE, SIZE)
    assert 0 <= float(found.trigger.pattern.min()) <= float(found.trigger.pattern.max()) <= 1
