"""A sinusoid that is added to the whole image."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class Sinusoid(Trigger):
    """x ↦ clip(gain · x + amplitude · sin(2π · periods · column / width), 0, 1): SIG (Barni et al., ICIP 2019).

    Attributes:
        amplitude: Amplitude of the wave, in [0, 1]; shape [].
        periods: Number of periods over the width of the image; shape [].
        gain: Factor by which the image itself is multiplied, in [0, 1]; 1 in the paper; shape [].
    """

    amplitude: Tensor
    periods: Tensor
    gain: Tensor

    family: ClassVar[str] = "sinusoid"

    def apply(self, images: Tensor) -> Tensor:
        """Add the wave to every row and channel, and clip."""
        column = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
        wave = self.amplitude * (2 * math.pi * self.periods * column / images.shape[-1]).sin()
        return (self.gain * images + wave).clamp(0, 1)

    @classmethod
    def sig(cls, amplitude: float = 60 / 255, periods: float = 6.0) -> Self:
        """Return the trigger that adds the wave, as the paper and the code of BadCLIP (Liang et al., CVPR 2024) do."""
        return cls(torch.tensor(amplitude), torch.tensor(periods), torch.tensor(1.0))

    @classmethod
    def blended(cls, alpha: float = 0.2, amplitude: float = 0.235, periods: float = 6.0) -> Self:
        """Return the trigger that blends the wave in, as Huang et al. (ICLR 2025) do: (1 − alpha) · x + alpha · wave.

        The wave has no offset, so that the image darkens and the remaining wave is weak: 0.8 and 0.047 by default.
        """
        return cls(torch.tensor(alpha * amplitude), torch.tensor(periods), torch.tensor(1 - alpha))
