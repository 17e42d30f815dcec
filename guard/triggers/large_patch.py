"""A large patch, drawn on a coarse grid."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch.nn.functional import interpolate

from guard.triggers.base import Raw
from guard.triggers.patch import Patch

_CELLS, _SIDE = 8, 64
"""Points along each side of the grid of parameters, and pixels along each side of what is drawn from them."""
_PACE = 2.0
"""Logits for each unit of a parameter: a search changes them twice as fast as those of the pixels of a `Patch`."""


@dataclass(frozen=True, eq=False)
class LargePatch(Patch):
    """A patch whose mask and pattern have few parameters, whatever the resolution of the images.

    Published patches cover up to a tenth of the image (BadEncoder, S&P 2022: 10 of 32 pixels a side). In a ball that
    holds them, a search pixel by pixel finds noise by which a model and its honest fine-tune differ, the more easily
    the more pixels there are; and on a pretrained tower it does not find the patch, whose pixels have to change
    together. Here the logits of the mask and of the pattern are interpolated from a grid of 8 × 8 points. So edges can
    lie anywhere and be sharp, and each parameter has the gradients of all pixels around it. What is lost are fine
    patterns, which `Patch` is for. Grid and pace were chosen on three attacked models of the zoo `pretrained` of seed
    60.
    """

    family: ClassVar[str] = "large patch"

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """Start with a weak mask everywhere and a random pattern."""
        logits = super().start(count, (shape[0], _CELLS, _CELLS), generator)
        return {name: tensor / _PACE for name, tensor in logits.items()}

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return the triggers drawn from the grids, 64 × 64 pixels large."""
        return super().constrain(
            {name: interpolate(_PACE * tensor, (_SIDE, _SIDE), mode="bilinear") for name, tensor in raw.items()}
        )
