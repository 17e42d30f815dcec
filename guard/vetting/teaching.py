"""Teach a tower the embeddings that another one computes, on clean unlabelled images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.vetting.disturbances import disturbed
from guard.vetting.memory import images_at_once

Progress = Callable[[str, int, int], None]
Schedule = Callable[[float], float]
"""The learning rate, relative to its peak, at each point of the work, from 0 to 1."""


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
    generator: torch.Generator,
    progress: Progress = lambda *_: None,
) -> None:
    """Train the image tower of a classifier to give the embeddings that another one gives.

    The loss is 1 − cosine. The teacher sees only the images as they are. The pupil sees each image changed
    (`guard.vetting.disturbances`) and learns the answer to the unchanged one. Two things follow: a few hundred images
    go a long way, and the pupil unlearns to follow a trigger. The teacher's own answers to changed images would teach
    it to follow those triggers that a change resembles: with such a pupil, screening saw 11 % of the requests that JPEG
    compression triggers, and none of those that a colour filter triggers, instead of 95 % and more.

    Args:
        pupil: Its image tower is trained, in the mode (training or evaluation) that it is in; its other parts are not.
        teacher: Computes the embeddings.
        images: Clean images: uint8, shape [N, 3, H, W].
        steps: Optimiser steps.
        batch: Images in each step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: The learning rate over the steps.
        generator: The only source of randomness; on the CPU.
        progress: Called with (what, steps done, steps in all).
    """
    tower = pupil.model.visual
    parameters = [parameter.requires_grad_() for parameter in tower.parameters() if parameter.is_floating_point()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    wanted = teacher.embed(images).to(pupil.device)
    # A tower that normalises by the statistics of its batch must see the batch whole.
    at_once = batch if tower.training else images_at_once([pupil])
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * schedule(step / steps)
        index = torch.randint(len(images), (batch,), generator=generator)
        pixels = disturbed(images[index].float() / 255, generator)
        optimiser.zero_grad(set_to_none=True)
        for part, answers in zip(pixels.split(at_once), wanted[index.to(pupil.device)].split(at_once), strict=True):
            with teacher.autocast():
                embeddings = pupil.encode_images(part.to(pupil.device))
            ((1 - (embeddings * answers).sum(-1)).sum() / batch).backward()
        optimiser.step()
        progress("teaching the reference model", step + 1, steps)
    tower.requires_grad_(requires_grad=False)
