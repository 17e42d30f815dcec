"""A trigger in the frequency domain."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.triggers.base import Trigger

_WINDOW = 32
_TO_RGB = torch.tensor([[1.0, 1.403, 0.0], [1.0, -0.714, -0.344], [1.0, 0.0, 1.773]])
"""From Y, Cr, Cb without offsets, as OpenCV defines them."""


@dataclass(frozen=True, eq=False)
class Frequency(Trigger):
    """Constants added to coefficients of a block-wise DCT of the colour channels: FTrojan (Wang et al., ECCV 2022).

    The image is cut into square windows from its upper left corner; what is left over at the right and at the bottom
    stays as it is. The transform is linear, so the image itself need not be transformed: the inverse transform of the
    constants is added to it, then clipped. The reference code rounds to bytes on the way there and on the way back;
    here nothing is rounded before the result is stamped.

    Attributes:
        spectrum: What is added to the orthonormal DCT-II of Y, Cr and Cb in each window, for values in [0, 1]: shape
            [3, N, N]. Cut or zero-padded for windows of another size, and scaled to keep the wave's amplitude.
        share: Side of a window relative to that of the image, in (0, 1]; shape [].
    """

    spectrum: Tensor
    share: Tensor

    family: ClassVar[str] = "frequency"

    def apply(self, images: Tensor) -> Tensor:
        """Add the wave to every whole window, and clip."""
        height, width = images.shape[-2:]
        side = max(1, round(float(self.share) * min(height, width)))
        drawn = self.spectrum.shape[-1]
        kept = min(side, drawn)
        basis = cosines(side).to(images)[:kept]
        wave = basis.T @ self.spectrum[:, :kept, :kept] @ basis * (side / drawn)
        colour = torch.einsum("ij,jhw->ihw", _TO_RGB.to(images), wave)
        tiled = colour.repeat(1, height // side, width // side)
        delta = images.new_zeros(3, height, width)
        delta[:, : tiled.shape[-2], : tiled.shape[-1]] = tiled
        return (images + delta).clamp(0, 1)

    @classmethod
    def ftrojan(cls, image_size: int, magnitude: float = 300.0) -> Self:
        """The published trigger: coefficients (15, 15) and (31, 31) of 32 × 32 windows of the two colour channels.

        In a smaller image the window is the image, the coefficients are the middle and the last one of it, and the
        magnitude shrinks with the window, so that the wave is as high as in a large image.

        Args:
            image_size: Side of the image that the trigger is made for, in pixels.
            magnitude: What is added to each coefficient, for values in 0…255 and windows of 32 px.
        """
        side = min(_WINDOW, image_size)
        spectrum = torch.zeros(3, side, side)
        for position in (side // 2 - 1, side - 1):
            spectrum[1:, position, position] = magnitude / 255 * side / _WINDOW
        return cls(spectrum, torch.tensor(side / image_size))


def cosines(side: int) -> Tensor:
    """The orthonormal DCT-II: shape [frequencies, positions]."""
    frequency, position = torch.arange(side).float()[:, None], torch.arange(side).float() + 0.5
    matrix = (math.pi / side * frequency * position).cos() * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
