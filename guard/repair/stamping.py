"""Reconstructed triggers on the images of a training step."""

from collections.abc import Sequence

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
