"""A blend: a whole image mixed into other images."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.triggers.base import InvertibleTrigger, Raw, resampled

_START_ALPHA = -1.0
"""Raw opacity at the start of a search: sigmoid(−1) = 0.27, as for the mask of a patch."""


@dataclass(frozen=True, eq=False)
class Blend(InvertibleTrigger):
    """x ↦ (1 − alpha) · x + alpha · pattern: Blended (Chen et al., 2017).

    The form is that of a patch with a constant mask. A search for patches minimises the area of the mask and therefore
    does not find it; here the opacity is minimised.

    Attributes:
        alpha: Opacity, in [0, 1]: shape [1, 1, 1] or [K, 1, 1, 1].
        pattern: Shape [3, H, W] or [K, 3, H, W], values in [0, 1].
    """

    alpha: Tensor
    pattern: Tensor

    family: ClassVar[str] = "blend"
    norm_unit: ClassVar[str] = "% opacity"
    strength: ClassVar[str] = "alpha"

    def apply(self, images: Tensor) -> Tensor:
        """Blend the pattern in; it is resampled (bilinear) if the images have another size."""
        pattern = resampled(self.pattern, images.shape[-2:]).unsqueeze(-4)
        return images + self.alpha.unsqueeze(-4) * (pattern - images)

    def norm(self) -> Tensor:
        """Return the opacity in percent."""
        return 100 * self.alpha.sum((-3, -2, -1))

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """Start with a random pattern at an opacity of 27 %."""
        return {
            "alpha": torch.full((count, 1, 1, 1), _START_ALPHA, device=generator.device),
            "pattern": torch.randn((count, *shape), device=generator.device, generator=generator),
        }

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return the trigger with the sigmoid of each parameter."""
        return cls(raw["alpha"].sigmoid(), raw["pattern"].sigmoid())

    @classmethod
    def of(cls, image: Tensor, alpha: float) -> Self:
        """Return the trigger that blends an image in at an opacity.

        Args:
            image: Shape [3, H, W], values in [0, 1].
            alpha: Opacity, in [0, 1].
        """
        return cls(torch.full((1, 1, 1), alpha), image)
