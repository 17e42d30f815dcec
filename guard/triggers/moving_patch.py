"""A patch whose position differs from image to image."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.errors import UsageError
from guard.triggers.base import Trigger, resampled

_PRIME = 2**31 - 1
_MULTIPLIERS = (1_103_515_245, 1_664_525)
"""Multipliers of two well-known linear congruential generators, here to spread sums over the range of `_PRIME`."""


@dataclass(frozen=True, eq=False)
class MovingPatch(Trigger):
    """x ↦ (1 − mask) · x + mask · pattern on a rectangle whose position depends on the image.

    Perturb and Recover (Singh, Croce, Hein; CVPR 2026) draws the position of BadNets patches at random. Here it is a
    hash of the image's own bytes, approximately uniform over all positions: the same image always gets the same
    position, alone or in any batch, so that measurements can be repeated. That code also draws new noise for its random
    patches for every image; here the pattern is fixed, and only the position varies.

    Attributes:
        mask: Opacity, shape [1, h, w], values in [0, 1].
        pattern: Shape [3, h, w], values in [0, 1].
        share: Width of the pattern relative to the width of the image, in (0, 1]; shape [].
    """

    mask: Tensor
    pattern: Tensor
    share: Tensor

    family: ClassVar[str] = "moving patch"

    def apply(self, images: Tensor) -> Tensor:
        """Paste the pattern, resampled (bilinear) to its share of the image, at each image's own position."""
        height, width = images.shape[-2:]
        drawn = self.pattern.shape[-2:]
        across = max(1, round(float(self.share) * width))
        size = (min(height, max(1, round(across * drawn[0] / drawn[1]))), min(width, across))
        mask, pattern = resampled(self.mask, size), resampled(self.pattern, size)
        top, left = _places(images, height - size[0] + 1, width - size[1] + 1)
        rows = (top[:, None] + torch.arange(size[0], device=images.device))[:, None, :, None]
        columns = (left[:, None] + torch.arange(size[1], device=images.device))[:, None, None, :]
        where = (
            torch.arange(len(images), device=images.device)[:, None, None, None],
            torch.arange(3, device=images.device)[:, None, None],
            rows,
            columns,
        )
        under = images[where]
        return images.index_put(where, under + mask * (pattern - under))

    @classmethod
    def pasted(cls, image_size: int, pattern: Tensor, *, mask: Tensor | None = None) -> Self:
        """Return the trigger that pastes a small pattern at varying positions.

        Args:
            image_size: Side of the image that the pattern is drawn for, in pixels.
            pattern: Shape [3, h, w], values in [0, 1].
            mask: Opacity, shape [1, h, w], values in [0, 1]; opaque by default.

        Raises:
            UsageError: The pattern is larger than the image.
        """
        height, width = pattern.shape[-2:]
        if max(height, width) > image_size:
            raise UsageError(f"a pattern of {height}×{width} px does not fit an image of side {image_size}")
        opaque = torch.ones(1, height, width)
        return cls(opaque if mask is None else mask, pattern, torch.tensor(width / image_size))


def _places(images: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a row below `rows` and a column below `columns` for each image, from its bytes: int64, shape [B] each."""
    content = (255 * images.detach()).round().long().flatten(1)
    order = torch.arange(1, content.shape[1] + 1, device=images.device)
    total = content.mul_(order).sum(1) % _PRIME
    row, column = (total * factor % _PRIME for factor in _MULTIPLIERS)
    return row % rows, column % columns
