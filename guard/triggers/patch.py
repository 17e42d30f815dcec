"""A patch: a part of the image is replaced by a pattern."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.errors import UsageError
from guard.triggers.base import InvertibleTrigger, Raw, resampled

_START_MASK = -1.0
"""Raw value of the mask at the start of a search: sigmoid(−1) = 0.27 everywhere, so that gradients reach each pixel."""


@dataclass(frozen=True, eq=False)
class Patch(InvertibleTrigger):
    """x ↦ (1 − mask) · x + mask · pattern.

    This is the mask–pattern form of Neural Cleanse (Wang et al., S&P 2019), which DECREE (CVPR 2023) uses too. With a
    hard square mask it is BadNets (Gu et al., 2017). A mask that is the same everywhere is a family of its own:
    `Blend`.

    Attributes:
        mask: Shape [1, H, W] or [K, 1, H, W], values in [0, 1].
        pattern: Shape [3, H, W] or [K, 3, H, W], values in [0, 1].
    """

    mask: Tensor
    pattern: Tensor

    family: ClassVar[str] = "patch"
    norm_unit: ClassVar[str] = "% of the image"
    strength: ClassVar[str] = "mask"

    def apply(self, images: Tensor) -> Tensor:
        """Blend the pattern in; mask and pattern are resampled (bilinear) if the images have another size."""
        mask, pattern = (resampled(tensor, images.shape[-2:]).unsqueeze(-4) for tensor in (self.mask, self.pattern))
        return images + mask * (pattern - images)

    def norm(self) -> Tensor:
        """Return the mean of the mask in percent: the share of the image that the trigger covers."""
        return 100 * self.mask.mean((-3, -2, -1))

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """Start with a weak mask everywhere and a random pattern."""
        channels, height, width = shape
        return {
            "mask": torch.full((count, 1, height, width), _START_MASK, device=generator.device),
            "pattern": torch.randn((count, channels, height, width), device=generator.device, generator=generator),
        }

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return the trigger with the sigmoid of each parameter."""
        return cls(raw["mask"].sigmoid(), raw["pattern"].sigmoid())

    @classmethod
    def badnets(cls, image_size: int, side: int, *, seed: int) -> Self:
        """Return a BadNets trigger: a square of coloured blocks of 2 × 2 pixels in the lower right corner.

        It uses blocks instead of single pixels, because a pattern of single pixels is lost in the first resize or
        strided convolution, and the attack then fails.

        Args:
            image_size: Side of the image that the trigger is made for.
            side: Side of the square, in pixels of that image.
            seed: Seed for the colours.
        """
        generator = torch.Generator().manual_seed(seed)
        blocks = (side + 1) // 2
        colours = torch.randint(0, 2, (3, blocks, blocks), generator=generator).float()
        square = colours.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, :side, :side]
        low = image_size - side - 1
        return cls.pasted(image_size, square, top=low, left=low)

    @classmethod
    def pasted(
        cls,
        image_size: int,
        pattern: Tensor,
        *,
        top: int | None = None,
        left: int | None = None,
        mask: Tensor | None = None,
    ) -> Self:
        """Return the trigger that pastes a small pattern at a fixed position, as published attacks on CLIP use it.

        Examples are white squares of 24 px at (185, 185) of 224 (DECREE), of 50 px at (173, 173) of 224 and of 10 px at
        (21, 21) of 32 (BadEncoder), and patterns of 16 px in the centre of 224 (BadCLIP; Huang et al. in their
        measurements).

        Args:
            image_size: Side of the image that the trigger is made for, in pixels.
            pattern: Shape [3, h, w], values in [0, 1].
            top: First row that the pattern covers; by default it is centred.
            left: First column that the pattern covers; by default it is centred.
            mask: Opacity, shape [1, h, w], values in [0, 1]; opaque by default.

        Raises:
            UsageError: The pattern does not lie within the image.
        """
        height, width = pattern.shape[-2:]
        top = (image_size - height) // 2 if top is None else top
        left = (image_size - width) // 2 if left is None else left
        if min(top, left) < 0 or max(top + height, left + width) > image_size:
            raise UsageError(
                f"a pattern of {height}×{width} px at row {top}, column {left} does not lie within an image of side "
                f"{image_size}; make it smaller or move it"
            )
        whole_mask, whole = torch.zeros(1, image_size, image_size), torch.zeros(3, image_size, image_size)
        rows, columns = slice(top, top + height), slice(left, left + width)
        whole_mask[:, rows, columns] = 1 if mask is None else mask
        whole[:, rows, columns] = pattern
        return cls(whole_mask, whole)
