"""A colour map, the same for every pixel."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.triggers.base import InvertibleTrigger, Raw

_SIDE = 4
_START_RADIUS = 32 / 255
_PIXELS = 2**20
"""Largest number of pixels that are mapped at once; it bounds the memory for their weights."""


@dataclass(frozen=True, eq=False)
class ColourMap(InvertibleTrigger):
    """x ↦ clip(x + displacement of the colour x, 0, 1), pixel by pixel.

    A coarse look-up table of colours, like those of photo editors. Between the points of its lattice the displacement
    is interpolated trilinearly. It approximates the photo filters that attackers use (Nashville; Huang et al., ICLR
    2025), whose exact form is `Filter`, without knowing the steps that they consist of.

    Attributes:
        lattice: Displacements of red, green and blue at n × n × n evenly spaced values of red, green and blue, in this
            order: shape [3, n, n, n] or [K, 3, n, n, n], values in [−1, 1].
    """

    lattice: Tensor

    family: ClassVar[str] = "colour map"
    norm_unit: ClassVar[str] = "/255 RMS"
    strength: ClassVar[str] = "lattice"

    def apply(self, images: Tensor) -> Tensor:
        """Map the colour of every pixel."""
        size = max(1, _PIXELS // images.shape[-2:].numel())
        return torch.cat([self._apply(part) for part in images.split(size)], -4)

    def _apply(self, images: Tensor) -> Tensor:
        # The weights of a pixel are the same for all K maps, which makes the interpolation one product of matrices.
        side = self.lattice.shape[-1]
        weights = _weights(images.movedim(-3, -1).flatten(0, -2), side)
        moved = weights @ self.lattice.reshape(-1, side**3).T
        height, width = images.shape[-2:]
        moved = moved.T.reshape(*self.lattice.shape[:-3], len(images), height, width).movedim(-4, -3)
        return (images + moved).clamp(0, 1)

    def norm(self) -> Tensor:
        """Return the root mean square of the displacements over lattice and channels, in steps of 1/255."""
        length: Tensor = torch.linalg.vector_norm(self.lattice, dim=(-4, -3, -2, -1))
        return 255 / math.sqrt(self.lattice.shape[-4:].numel()) * length

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:  # noqa: ARG003 - a map of colours has no size
        """Start with random displacements of up to 32/255 at 4 × 4 × 4 colours."""
        size = (count, 3, _SIDE, _SIDE, _SIDE)
        return {
            "direction": torch.randn(size, device=generator.device, generator=generator),
            "radius": torch.full((count, 1, 1, 1, 1), _START_RADIUS, device=generator.device).logit(),
        }

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return sigmoid(radius) · tanh(direction)."""
        return cls(raw["radius"].sigmoid() * raw["direction"].tanh())


def _weights(colours: Tensor, side: int) -> Tensor:
    """Return the weight of each point of the lattice at each of some colours, shape [P, 3]: shape [P, side³]."""
    points = torch.arange(side, device=colours.device)
    red, green, blue = (1 - ((side - 1) * colours[..., None] - points).abs()).relu().unbind(1)
    return (red[:, :, None, None] * green[:, None, :, None] * blue[:, None, None, :]).flatten(1)
