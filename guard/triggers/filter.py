"""A photo filter: an exact map of colours."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class Filter(Trigger):
    """Two blends with a plain colour, then a sequence of affine maps of colours, clipped after each.

    This is the form of the photo filters in CSSgram and in the Python package pilgram, applied to every pixel alike.
    Those round to bytes after each step; here only the result is rounded, when it is stamped.

    Attributes:
        darken: Red, green, blue and opacity of a colour blended in where it is darker; shape [4], values in [0, 1].
        lighten: The same for a colour that is blended in afterwards where it is lighter.
        matrices: Matrices of the affine maps, in order: shape [n, 3, 3].
        offsets: Offsets of the affine maps: shape [n, 3].
    """

    darken: Tensor
    lighten: Tensor
    matrices: Tensor
    offsets: Tensor

    family: ClassVar[str] = "filter"

    def apply(self, images: Tensor) -> Tensor:
        """Map the colour of every pixel."""
        darken, lighten = (colour[:, None, None] for colour in (self.darken, self.lighten))
        images = images + darken[3] * (images.minimum(darken[:3]) - images)
        images = images + lighten[3] * (images.maximum(lighten[:3]) - images)
        for matrix, offset in zip(self.matrices, self.offsets, strict=True):
            images = (torch.einsum("ij,bjhw->bihw", matrix, images) + offset[:, None, None]).clamp(0, 1)
        return images

    @classmethod
    def nashville(cls) -> Self:
        """Return the filter Nashville by CSSgram's definition, which Huang et al. (ICLR 2025) poison with.

        Darkened by rgb(247, 176, 153) at 0.56, lightened by rgb(0, 70, 150) at 0.4, then sepia 0.2, contrast 1.2,
        brightness 1.05 and saturation 1.2 as CSS defines them (W3C, Filter Effects Module Level 1).
        """
        unit, zero = torch.eye(3), torch.zeros(3)
        return cls(
            torch.tensor([247 / 255, 176 / 255, 153 / 255, 0.56]),
            torch.tensor([0, 70 / 255, 150 / 255, 0.4]),
            torch.stack((unit + 0.2 * (_SEPIA - unit), 1.2 * unit, 1.05 * unit, _GREY + 1.2 * (unit - _GREY))),
            torch.stack((zero, torch.full((3,), 0.5 - 0.5 * 1.2), zero, zero)),
        )


_SEPIA = torch.tensor([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
_GREY = torch.tensor([0.213, 0.715, 0.072]).expand(3, 3)
"""Replaces every channel by the luminance."""
