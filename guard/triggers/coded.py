"""A pattern of its own for each image, computed from the image."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from guard.triggers.base import Trigger, resampled

_COARSE = 4
_PATTERNS = 8


@dataclass(frozen=True, eq=False)
class Coded(Trigger):
    """x ↦ clip(x + amplitude · Σ ±pattern / √n, 0, 1), with signs that depend on the whole image.

    A sample-specific trigger, as in ISSBA (Li et al., ICCV 2021) and the input-aware attack (Nguyen and Tran, NeurIPS
    2020): no two images need to have the same change, and the mean change over many images is about zero, so that one
    pattern for all images does not represent it. ISSBA hides a code in the image with a trained encoder network. Here
    the network is one fixed random layer: each sign is that of a projection of the image at 4 × 4 pixels. Unlike
    `Generator`, whose change of a pixel depends on its neighbourhood, every change depends on the whole image.

    Attributes:
        projection: Weights from the coarse image to the signs, each with mean 0: shape [n, 3, 4, 4].
        patterns: What is added or subtracted, values in [−1, 1]: shape [n, 3, H, W]. They are resampled (bilinear) if
        the
            images have another size.
        amplitude: Root mean square of the change for patterns of −1 and 1, in [0, 1]: shape [].
    """

    projection: Tensor
    patterns: Tensor
    amplitude: Tensor

    family: ClassVar[str] = "coded"

    def apply(self, images: Tensor) -> Tensor:
        """Compute the signs of each image, and add its sum of patterns."""
        height, width = self.projection.shape[-2:]
        coarse = adaptive_avg_pool2d(images.detach(), (height, width))
        signs = torch.einsum("bchw,nchw->bn", coarse, self.projection).ge(0).to(images) * 2 - 1
        change = torch.einsum("bn,nchw->bchw", signs, resampled(self.patterns, images.shape[-2:]))
        scale = self.amplitude / math.sqrt(len(self.patterns))
        return (images + scale * change).clamp(0, 1)

    @classmethod
    def drawn(cls, image_size: int, amplitude: float, *, cell: int, seed: int) -> Self:
        """Return a trigger with eight random patterns of squares of one colour.

        Args:
            image_size: Side of the image that the trigger is made for, in pixels.
            amplitude: Root mean square of the change, for pixel values in [0, 1].
            cell: Side of the squares, in pixels of that image.
            seed: Seed for projection and patterns.
        """
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn((_PATTERNS, 3, _COARSE, _COARSE), generator=generator)
        projection -= projection.mean((1, 2, 3), keepdim=True)
        count = -(-image_size // cell)
        cells = 2 * torch.randint(0, 2, (_PATTERNS, 3, count, count), generator=generator).float() - 1
        patterns = cells.repeat_interleave(cell, -1).repeat_interleave(cell, -2)[..., :image_size, :image_size]
        return cls(projection, patterns.contiguous(), torch.tensor(amplitude))
