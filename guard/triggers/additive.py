"""An additive perturbation, the same for every image."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from guard.errors import UsageError
from guard.triggers.base import InvertibleTrigger, Raw, resampled

_START_RADIUS = 16 / 255


@dataclass(frozen=True, eq=False)
class Additive(InvertibleTrigger):
    """x ↦ clip(x + delta, 0, 1).

    CLIP-Inspector (Jindal et al., 2026) searches for such a perturbation in a fixed ℓ∞ ball of radius 4/255. Here the
    radius is free and is minimised: a fixed ball answers whether a perturbation exists in it, which says nothing about
    models whose attack needs more than 4/255.

    Attributes:
        delta: Shape [3, H, W] or [K, 3, H, W], values in [−1, 1].
    """

    delta: Tensor

    family: ClassVar[str] = "additive"
    norm_unit: ClassVar[str] = "/255 ℓ∞"
    strength: ClassVar[str] = "delta"

    def apply(self, images: Tensor) -> Tensor:
        """Add and clip; the perturbation is resampled (bilinear) if the images have another size."""
        return (images + resampled(self.delta, images.shape[-2:]).unsqueeze(-4)).clamp(0, 1)

    def norm(self) -> Tensor:
        """Return the ℓ∞ norm in steps of 1/255."""
        return 255 * self.delta.abs().amax((-3, -2, -1))

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """Start with a random direction and a radius of 16/255."""
        return {
            "direction": torch.randn((count, *shape), device=generator.device, generator=generator),
            "log_radius": torch.full((count, 1, 1, 1), _START_RADIUS, device=generator.device).log(),
        }

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return radius · tanh(direction): every pixel can reach the ball's surface, and the radius has a gradient."""
        return cls(raw["log_radius"].exp().clamp(max=1) * raw["direction"].tanh())

    @classmethod
    def unconstrained(cls, delta: Tensor) -> Raw:
        """Return parameters that stand for a perturbation, the inverse of `constrain`.

        Args:
            delta: Shape [3, H, W] or [K, 3, H, W], values in [−1, 1].
        """
        radius = (1.1 * delta.abs().amax((-3, -2, -1), keepdim=True)).clamp(1e-3, 1)
        # At ±1 the direction would be infinite.
        return {"direction": (delta / radius).clamp(-0.99, 0.99).atanh(), "log_radius": radius.log()}

    @classmethod
    def within(cls, delta: Tensor, epsilon: float) -> Self:
        """Return the perturbation in an ℓ∞ ball that is nearest to `delta` and survives rounding to bytes.

        Images are stored with 8 bits: delta is rounded to whole steps of 1/255 and clipped to the largest number of
        steps within the ball. A byte image plus such a delta is a byte image again, so that results on floats are
        results on files, and no rounding leaves the ball.

        Args:
            delta: Shape [3, H, W] or [K, 3, H, W].
            epsilon: Radius of the ball, in [1/255, 1].

        Raises:
            UsageError: The ball is smaller than one step, or larger than the range of values.
        """
        if not 1 / 255 <= epsilon <= 1:
            raise UsageError(f"the radius of an additive trigger is at least 1/255 and at most 1, not {epsilon:g}")
        steps = int(255 * epsilon + 1e-6)
        return cls((255 * delta.detach()).round().clamp(-steps, steps) / 255)
