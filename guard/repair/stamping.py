"""Reconstructed triggers on the images of a training step."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guard.repair.cases import TargetedTrigger
from guard.triggers import InvertibleTrigger, Trigger
from guard.triggers.forms import FORMS


def stamped(pixels: Tensor, triggers: Sequence[TargetedTrigger], generator: torch.Generator) -> Tensor:
    """Put one of the triggers, drawn at random, on each image, rounded to bytes as in a request.

    Args:
        pixels: Shape [N, 3, H, W], values in [0, 1], on the device of the triggers.
        triggers: At least one.
        generator: The only source of randomness; on the CPU.

    Returns:
        The same shape.
    """
    changed = pixels.clone()
    drawn = torch.randint(len(triggers), (len(pixels),), generator=generator).to(pixels.device)
    for k, each in enumerate(triggers):
        rows = (drawn == k).nonzero().flatten()
        if len(rows):
            changed[rows] = (each.trigger.apply(pixels[rows]) * 255).round() / 255
    return changed


def varied(trigger: Trigger, factor: float) -> Trigger:
    """Return a trigger with its strength multiplied, within the range of its family; others as they are.

    Args:
        trigger: A trigger.
        factor: Of its strength; positive.
    """
    if not isinstance(trigger, InvertibleTrigger):
        return trigger
    tensors, form = trigger.tensors(), FORMS[trigger.family][trigger.strength]
    strength = (tensors[trigger.strength] * factor).clamp(form.low, form.high)
    return type(trigger)(**{**tensors, trigger.strength: strength})


def varied_all(triggers: Sequence[TargetedTrigger], generator: torch.Generator) -> list[TargetedTrigger]:
    """Return triggers with their strengths multiplied by random factors from 0.6 to 1.6.

    Args:
        triggers: Any number.
        generator: The only source of randomness; on the CPU.
    """
    factors = (0.6 + torch.rand(len(triggers), generator=generator)).tolist()
    return [replace(each, trigger=varied(each.trigger, k)) for each, k in zip(triggers, factors, strict=True)]


def mixed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each image with another of the step, at most to equal shares.

    Mixtures of a few hundred clean images are many more inputs, at which a model can be kept as it was.

    Args:
        pixels: Shape [N, 3, H, W], values in [0, 1], on the CPU.
        generator: The only source of randomness; on the CPU.

    Returns:
        The same shape.
    """
    share = 0.5 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    return pixels.lerp(pixels[torch.randperm(len(pixels), generator=generator)], share)
