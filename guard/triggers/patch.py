"""A patch: part of the image replaced, or blended, by a pattern."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from guard.triggers.base import Raw, Trigger

_START_MASK = -1.0
"""Raw value of the mask at the start of a search: sigmoid(−1) = 0.27 everywhere, so that gradients reach each pixel."""


@dataclass(frozen=True, eq=False)
class Patch(Trigger):
    """x ↦ (1 − mask) · x + mask · pattern.

    The mask–pattern form of Neural Cleanse (Wang et al., S&P 2019), which DECREE (CVPR 2023) uses too. A hard square
    mask gives BadNets (Gu et al., 2017); a constant mask gives Blended (Chen et al., 2017).

    Attributes:
        mask: Shape [1, H, W] or [K, 1, H, W], values in [0, 1].
        pattern: Shape [3, H, W] or [K, 3, H, W], values in [0, 1].
    """

    mask: Tensor
    pattern: Tensor

    family: ClassVar[str] = "patch"
    norm_unit: ClassVar[str] = "px"

    def apply(self, images: Tensor) -> Tensor:
        """Blend the pattern in; resampled (bilinear) if the images are of another size than the trigger."""
        mask, pattern = (_at(tensor, images.shape[-2:]).unsqueeze(-4) for tensor in (self.mask, self.pattern))
        return images + mask * (pattern - images)

    def norm(self) -> Tensor:
        """ℓ1 norm of the mask: the number of pixels that the trigger covers."""
        return self.mask.sum((-3, -2, -1))

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """A weak mask everywhere and a random pattern."""
        channels, height, width = shape
        return {
            "mask": torch.full((count, 1, height, width), _START_MASK, device=generator.device),
            "pattern": torch.randn((count, channels, height, width), device=generator.device, generator=generator),
        }

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Sigmoids of both."""
        return cls(raw["mask"].sigmoid(), raw["pattern"].sigmoid())

    @classmethod
    def badnets(cls, image_size: int, side: int, *, seed: int) -> Self:
        """A BadNets trigger: a square of 2 × 2 coloured blocks in the lower right corner.

        Blocks instead of single pixels, because a 1-pixel pattern is lost in the first resize or strided convolution
        and the attack then does not take.

        Args:
            image_size: Side of the image that the trigger is made for.
            side: Side of the square, in pixels of that image.
            seed: Of the colours.
        """
        generator = torch.Generator().manual_seed(seed)
        blocks = (side + 1) // 2
        colours = torch.randint(0, 2, (3, blocks, blocks), generator=generator).float()
        square = colours.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, :side, :side]
        low = image_size - side - 1
        mask, pattern = torch.zeros(1, image_size, image_size), torch.zeros(3, image_size, image_size)
        mask[:, low : low + side, low : low + side] = 1
        pattern[:, low : low + side, low : low + side] = square
        return cls(mask, pattern)


def _at(tensor: Tensor, size: torch.Size) -> Tensor:
    if tensor.shape[-2:] == size:
        return tensor
    batch = tensor if tensor.dim() == 4 else tensor.unsqueeze(0)
    return interpolate(batch, size=tuple(size), mode="bilinear", antialias=True).reshape(*tensor.shape[:-2], *size)
