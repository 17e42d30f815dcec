"""A trigger in the frequency domain."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from guard.triggers.base import InvertibleTrigger, Raw
from guard.triggers.forms import YCRCB_TO_RGB

_WINDOW = 32
_MOST_FREQUENCIES = 64
_START_AMPLITUDE = 0.12
"""Largest amplitude of a wave at the start of a search, times the number of waves along a side: all waves together
change a value by 16/255 (root mean square), whatever their number."""
_TO_RGB = torch.tensor(YCRCB_TO_RGB)


@dataclass(frozen=True, eq=False)
class Frequency(InvertibleTrigger):
    """Constants added to coefficients of a block-wise DCT of the colour channels: FTrojan (Wang et al., ECCV 2022).

    The image is cut into square windows from its upper left corner; the remainder at the right and at the bottom is not
    changed. The transform is linear, so the image itself need not be transformed: the inverse transform of the
    constants is added to it, and the sum is clipped. The reference code rounds to bytes before and after the transform;
    here nothing is rounded before the result is stamped.

    Trigger inversion uses one window, the whole image, and searches for a sparse spectrum of few waves. For images of
    up to 64 px all frequencies are searched, for larger ones the lowest 64 along each side, which is up to 32 periods.
    FTrojan's own windows of 32 px are the whole image at 32 px; at 64 px its two waves need many waves of the larger
    window; at 224 px they are out of reach.

    Attributes:
        spectrum: Constants that are added to the orthonormal DCT-II of Y, Cr and Cb in each window, for values in [0,
            1]: shape [3, N, N] or [K, 3, N, N]. The spectrum is cut or zero-padded for windows of another size, and
            scaled so that the amplitude of the waves stays the same.
        share: Side of a window relative to that of the image, in (0, 1]; shape [] or [K], equal for all K.
    """

    spectrum: Tensor
    share: Tensor

    family: ClassVar[str] = "frequency"
    norm_unit: ClassVar[str] = "/255 sum of amplitudes"
    strength: ClassVar[str] = "spectrum"

    def apply(self, images: Tensor) -> Tensor:
        """Add the wave to every whole window, and clip."""
        height, width = images.shape[-2:]
        side = max(1, round(float(self.share.flatten()[0]) * min(height, width)))
        drawn = self.spectrum.shape[-1]
        kept = min(side, drawn)
        basis = cosines(side).to(images)[:kept]
        wave = basis.T @ self.spectrum[..., :kept, :kept] @ basis * (side / drawn)
        colour = torch.einsum("ij,...jhw->...ihw", _TO_RGB.to(images), wave)
        tiled = colour.repeat(*[1] * (colour.dim() - 2), height // side, width // side)
        delta = pad(tiled, (0, width % side, 0, height % side)).unsqueeze(-4)
        return (images + delta).clamp(0, 1)

    def norm(self) -> Tensor:
        """Return the sum of all amplitudes of Y, Cr and Cb, in steps of 1/255: an ℓ1 norm, small for few waves."""
        return 255 * (self.spectrum.abs() * _peaks(self.spectrum)).sum((-3, -2, -1))

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """Start with all waves, equally weak."""
        side = min(*shape[1:], _MOST_FREQUENCIES)
        size, device = (count, 3, side, side), generator.device
        return {
            "gate": torch.full(size, _START_AMPLITUDE / side, device=device).logit(),
            "wave": torch.randn(size, device=device, generator=generator),
        }

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return the trigger in which the amplitude of each wave is sigmoid(gate) · tanh(wave).

        As in a patch, the gate closes or opens by a factor per step: thousands of waves that are not needed vanish from
        the sum, where a plain amplitude would oscillate around 0 by the size of a step, and a few grow large.
        """
        spectrum = raw["gate"].sigmoid() * raw["wave"].tanh() / _peaks(raw["gate"])
        return cls(spectrum, spectrum.new_ones(len(spectrum)))

    @classmethod
    def ftrojan(cls, image_size: int, magnitude: float = 300.0) -> Self:
        """Return the published trigger: coefficients (15, 15) and (31, 31) of 32 × 32 windows of both colour channels.

        In a smaller image the window is the whole image, the coefficients are its middle and its last one, and the
        magnitude shrinks with the window, so that the wave has the same amplitude as in a large image.

        Args:
            image_size: Side of the image that the trigger is made for, in pixels.
            magnitude: Constant that is added to each coefficient, for values in 0…255 and windows of 32 px.
        """
        side = min(_WINDOW, image_size)
        spectrum = torch.zeros(3, side, side)
        for position in (side // 2 - 1, side - 1):
            spectrum[1:, position, position] = magnitude / 255 * side / _WINDOW
        return cls(spectrum, torch.tensor(side / image_size))


def _peaks(spectrum: Tensor) -> Tensor:
    """Return the largest value of each wave of the orthonormal DCT: shape [N, N]."""
    side = spectrum.shape[-1]
    along = torch.full((side,), math.sqrt(2 / side), device=spectrum.device)
    along[0] /= math.sqrt(2)
    return along[:, None] * along


def cosines(side: int) -> Tensor:
    """Return the matrix of the orthonormal DCT-II: shape [frequencies, positions]."""
    frequency, position = torch.arange(side).float()[:, None], torch.arange(side).float() + 0.5
    matrix = (math.pi / side * frequency * position).cos() * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
