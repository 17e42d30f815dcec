"""Fewer colours: every channel rounded to a few levels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guard.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class Quantisation(Trigger):
    """x ↦ round((levels − 1) · x) / (levels − 1): BppAttack (Wang et al., CVPR 2022), without its dithering.

    BppAttack spreads the rounding error over neighbouring pixels (Floyd and Steinberg, 1976), to hide the bands of
    colour from people. That depends on the order of pixels and does not change what a model has to learn: few colours.

    Attributes:
        levels: Values that are left of each channel, evenly spaced from 0 to 1: a whole number from 2; shape [].
    """

    levels: Tensor

    family: ClassVar[str] = "quantisation"

    def apply(self, images: Tensor) -> Tensor:
        """Round every value; the gradient passes as if nothing was rounded."""
        steps = self.levels.round() - 1
        rounded = (images * steps).round() / steps
        return images + (rounded - images).detach()
