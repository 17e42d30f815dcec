"""The search of DECREE's released code, step by step.

Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023; github.com/GiantSeaweed/DECREE. The loop, its
constants and the order of its random draws are those of the released code; the departures are named where they occur.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.classifier import Classifier
from guard.triggers import Patch

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BETAS = (0.5, 0.9)
_EPSILON = 1e-7


@dataclass(frozen=True)
class PublishedSettings:
    """Settings of the released code's search, with its constants for CLIP and ImageNet encoders.

    The search normalises the input of every encoder as ImageNet's, takes each norm from the one batch on which it
    succeeded, and may stop only at the end of an epoch. The released code's reset of the weight of the norm is left
    out, since it cannot happen: it requires more successes in a row than it takes for the weight to leave the range in
    which they count.

    Attributes:
        epochs: Largest number of passes over the images.
        batch: Images in each step.
        learning_rate: Learning rate of Adam until the first milestone.
        milestones: Epochs from which the learning rate is 0.1 and 0.05.
        success: Mean pairwise cosine that the patch must reach on a batch, in (−1, 1).
        weight: Initial weight of the norm: loss per unit of the norm, which counts each pixel three times.
        smallest: Weight below which it is not lowered any more.
        largest: Weight above which it is not raised any more.
        factor: Factor by which the weight changes.
        patience: The weight changes after more than this many successes, or failures, in a row.
        stall: Number of steps without a smaller norm after which the search may stop.
        seed: Seed for the start and for the batches, drawn in the order of the released code on a CPU.
    """

    epochs: int = 1000
    batch: int = 32
    learning_rate: float = 0.5
    milestones: tuple[int, int] = (200, 500)
    success: float = 0.99
    weight: float = 1e-3
    smallest: float = 1e-7
    largest: float = 1e5
    factor: float = 5.0
    patience: int = 5
    stall: int = 35
    seed: int = 80


@dataclass(frozen=True)
class SearchedPatch:
    """What a search ended with, before it is measured.

    Attributes:
        patch: The smallest patch that reached the similarity; the last one tried where none did.
        reached: Whether the similarity was reached.
        steps: Optimiser steps made.
        passes: Number of images pushed through the image tower.
    """

    patch: Patch
    reached: bool
    steps: int
    passes: int


def search_as_published(
    encoder: Classifier, images: Tensor, settings: PublishedSettings, progress: Callable[[int, int], None]
) -> SearchedPatch:
    """Search for the smallest patch under which all embeddings look alike, as the released code does.

    Args:
        encoder: The suspect; only its image tower is used.
        images: uint8, shape [N, 3, H, W] at the encoder's resolution.
        settings: How much work to do.
        progress: Called with (steps done, largest number of steps).
    """
    _, height, width = encoder.image_shape
    generator = torch.Generator().manual_seed(settings.seed)
    mask = _unconstrained(torch.rand(height, width, 1, dtype=torch.float64, generator=generator), encoder)
    pattern = _unconstrained(torch.rand(height, width, 3, dtype=torch.float64, generator=generator), encoder)
    torch.rand(1, 512, dtype=torch.float64, generator=generator)  # the released code draws it and leaves it unused
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=encoder.device).view(3, 1, 1)
        for values in (_IMAGENET_MEAN, _IMAGENET_STD)
    )
    optimiser = torch.optim.Adam([mask, pattern], lr=settings.learning_rate, betas=_BETAS)
    weight = _NormWeight(settings)
    best, best_norm, since, steps, passes = None, float("inf"), 0, 0, 0
    total = settings.epochs * -(-len(images) // settings.batch)
    for epoch in range(settings.epochs):
        for group in optimiser.param_groups:
            group["lr"] = (settings.learning_rate, 0.1, 0.05)[sum(epoch >= start for start in settings.milestones)]
        similarities = []
        for index in _epoch(len(images), settings.batch, generator):
            cover, colour = _values(mask.repeat(1, 1, 3)), _values(pattern) * 255
            pixels = images[index].to(encoder.device).permute(0, 2, 3, 1)
            stamped = ((1 - cover) * pixels + cover * colour).permute(0, 3, 1, 2) / 255
            embeddings = encoder.model.encode_image(((stamped - mean) / std).contiguous().float())
            unit = normalize(embeddings, dim=-1)
            cosines = unit @ unit.T
            similarity = cosines[~torch.eye(len(index), dtype=torch.bool, device=encoder.device)].mean()
            norm = cover.sum()
            optimiser.zero_grad(set_to_none=True)
            (weight.value * norm - similarity).backward()
            optimiser.step()
            value, size = torch.stack([similarity.detach(), norm.detach()]).tolist()
            success = value > settings.success
            since += best is not None
            if success and size < best_norm:
                best, best_norm, since = (cover.detach(), colour.detach()), size, 0
            weight.update(success=success)
            similarities.append(value)
            steps, passes = steps + 1, passes + len(index)
            progress(steps, total)
        if sum(similarities) / len(similarities) > settings.success and since > settings.stall:
            break
    cover, colour = best or (_values(mask).detach(), _values(pattern).detach() * 255)
    patch = Patch(cover[None, ..., 0].float(), (colour / 255).permute(2, 0, 1).float())
    return SearchedPatch(patch.detach(), best is not None, steps, passes)


class _NormWeight:
    """The weight λ of the norm, as the released code changes it."""

    def __init__(self, settings: PublishedSettings) -> None:
        self._settings = settings
        self.value = settings.weight
        self._successes = self._failures = 0

    def update(self, *, success: bool) -> None:
        """Take the outcome of a step into account."""
        settings = self._settings
        self._successes = self._successes + 1 if success else 0
        self._failures = 0 if success else self._failures + 1
        if self._successes > settings.patience:
            self.value *= settings.factor if self.value < settings.largest else 1
            self._successes = 0
        elif self._failures > settings.patience:
            self.value /= settings.factor if self.value >= settings.smallest else 1
            self._failures = 0


def _unconstrained(values: Tensor, encoder: Classifier) -> Tensor:
    """Return a leaf tensor that `_values` maps to these values in [0, 1]."""
    return ((values - 0.5) * (2 - _EPSILON)).atanh().to(encoder.device).requires_grad_()


def _values(raw: Tensor) -> Tensor:
    return (raw.tanh() / (2 - _EPSILON) + 0.5).clip(0, 1)


def _epoch(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield one epoch's batches of indices, drawn as torch's DataLoader draws them from the global generator.

    A last batch of one image has no pairs: the released code's loss is then not a number. Here the image is left out.
    """
    _, seed = (torch.empty((), dtype=torch.int64).random_(generator=generator) for _ in range(2))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(int(seed)))
    yield from (part for part in order.split(batch) if len(part) > 1)
