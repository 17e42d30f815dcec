"""Teach a tower the embeddings that another one computes, on clean unlabelled images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from guard.classifiers.classifier import Classifier

Progress = Callable[[str, int, int], None]
Schedule = Callable[[float], float]
"""The learning rate, relative to its peak, at each point of the work, from 0 to 1."""


def falling(done: float) -> float:
    """The peak for the first half, then linearly to zero."""
    return min(1.0, 2 * (1 - done))


def one_cycle(done: float) -> float:
    """A warm-up over a tenth of the work, and the falling half of a cosine."""
    return min(1.0, 10 * done + 1e-3) * (1 + math.cos(math.pi * done)) / 2


def teach(
    pupil: Classifier,
    teacher: Classifier,
    images: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    schedule: Schedule,
    augment: bool,
    generator: torch.Generator,
    progress: Progress = lambda *_: None,
) -> None:
    """Train the image tower of a classifier to give the embeddings that another one gives.

    The loss is 1 − cosine. With augmentation, both see the same changed image, so that any change is a right example
    and a few hundred images go a long way; what the teacher does only under a trigger is still not taught, because no
    such change makes one.

    Args:
        pupil: Its image tower is trained, in the mode (training or evaluation) that it is in; its other parts are not.
        teacher: Computes the embeddings.
        images: Clean images: uint8, shape [N, 3, H, W].
        steps: Optimiser steps.
        batch: Images in each step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: The learning rate over the steps.
        augment: Whether images are turned, scaled, moved and recoloured (`augmented`).
        generator: The only source of randomness; on the CPU.
        progress: Called with (what, steps done, steps in all).
    """
    tower = pupil.model.visual
    parameters = [parameter.requires_grad_() for parameter in tower.parameters() if parameter.is_floating_point()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    wanted = None if augment else teacher.embed(images)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * schedule(step / steps)
        index = torch.randint(len(images), (batch,), generator=generator)
        pixels = images[index].float() / 255
        if augment:
            pixels = augmented(pixels, generator)
        pixels = pixels.to(pupil.device)
        with teacher.autocast():
            if wanted is None:
                with torch.no_grad():
                    expected = teacher.encode_images(pixels)
            else:
                expected = wanted[index].to(pupil.device)
            embeddings = pupil.encode_images(pixels)
        loss = (1 - (embeddings * expected).sum(-1)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        progress("teaching the reference model", step + 1, steps)
    tower.requires_grad_(requires_grad=False)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 9°, scale it by up to 10 %, move it by up to 5 % of the side, and change its colours.

    Contrast changes by up to 20 %, and the brightness of each channel by up to 0.1. What comes in from outside is a
    reflection of the image.

    Args:
        images: Shape [N, 3, H, W], values in [0, 1].
        generator: The only source of randomness.
    """

    def drawn(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) - 0.5

    angle, scale = 0.3 * drawn(), 1 + 0.2 * drawn()
    turned = torch.stack(
        [scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()], dim=1
    ).reshape(-1, 2, 2)
    # Coordinates run from −1 to 1, so that 0.1 is 5 % of the side.
    grid = affine_grid(torch.cat([turned, 0.2 * drawn(2, 1)], dim=2), list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    recoloured = (moved - 0.5) * (1 + 0.4 * drawn(1, 1, 1)) + 0.5 + 0.2 * drawn(3, 1, 1)
    return recoloured.clamp(0, 1)
