"""A smooth warp of the image."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from guard.errors import UsageError
from guard.triggers.base import InvertibleTrigger, Raw

_POINTS = 8
_START_RADIUS = 0.1
_NORM_SIDE = 32


@dataclass(frozen=True, eq=False)
class Warp(InvertibleTrigger):
    """Each pixel is read from a nearby position: WaNet (Nguyen and Tran, ICLR 2021).

    Positions beyond the border read the border, where the reference code clips the positions themselves to the image.

    Attributes:
        field: Displacements along x and y at k × k control points that span the image, in units of its side: shape
            [2, k, k] or [K, 2, k, k]. Between the points it is bicubic.
    """

    field: Tensor

    family: ClassVar[str] = "warp"
    norm_unit: ClassVar[str] = "% of the side"
    strength: ClassVar[str] = "field"

    def apply(self, images: Tensor) -> Tensor:
        """Sample the images (bilinear) at the displaced positions."""
        count, channels, height, width = images.shape
        field = _spread(self.field, (height, width))
        y, x = ((torch.arange(side, device=images.device, dtype=images.dtype) + 0.5) / side for side in (height, width))
        # All images share one grid, so they travel as channels of one. The places are in [−1, 1], hence the factor 2.
        places = 2 * torch.stack((x + field[..., 0, :, :], y[:, None] + field[..., 1, :, :]), -1) - 1
        # torch reads and writes outside of its memory for a place that is not a number, which gradients of a model that
        # overflows lead to.
        grids = places.reshape(-1, height, width, 2).nan_to_num(0.0)
        stacked = images.reshape(1, count * channels, height, width).expand(len(grids), -1, -1, -1)
        warped = grid_sample(stacked, grids, mode="bilinear", padding_mode="border", align_corners=False)
        return warped.reshape(*field.shape[:-3], *images.shape).clamp(0, 1)

    def norm(self) -> Tensor:
        """Return the root mean square displacement over the image (at 32 × 32 positions), in percent of its side."""
        spread = _spread(self.field, (_NORM_SIDE, _NORM_SIDE))
        length: Tensor = torch.linalg.vector_norm(spread, dim=(-3, -2, -1))
        return 100 / _NORM_SIDE * length

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:  # noqa: ARG003 - a field spans any size
        """Start with random displacements of up to a tenth of the side at 8 × 8 control points."""
        size = (count, 2, _POINTS, _POINTS)
        return {
            "direction": torch.randn(size, device=generator.device, generator=generator),
            "radius": torch.full((count, 1, 1, 1), _START_RADIUS, device=generator.device).logit(),
        }

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return sigmoid(radius) · tanh(direction): one step size does not suit both strength and shape."""
        return cls(raw["radius"].sigmoid() * raw["direction"].tanh())

    @classmethod
    def wanet(cls, image_size: int, strength: float, *, k: int = 4, seed: int) -> Self:
        """Return a random smooth field of a given mean displacement.

        The control points are uniform noise, as in the reference code. That code divides the noise by its mean
        magnitude and then interpolates, which changes the mean; here the field is scaled so that the mean magnitude
        along each axis, over the pixels of the image, is `strength`. The s of that code counts half pixels: s = 1 is a
        mean of 0.5 px. Huang et al. (ICLR 2025) use a mean of 0.5 px at 256; a small CLIP learns 2 px of 32 and not
        reliably 1 px.

        Args:
            image_size: Side of the image in whose pixels `strength` is given.
            strength: Mean magnitude of the displacement along each axis, in pixels.
            k: Control points per side; from 4 (WaNet's default) to `image_size` (CleanCLIP and PAR: independent noise
                at each pixel).
            seed: Seed for the noise.

        Raises:
            UsageError: There are fewer than 2 control points, or more than pixels.
        """
        if not 2 <= k <= image_size:
            raise UsageError(f"a warp needs 2 to {image_size} control points per side, not {k}")
        noise = 2 * torch.rand((2, k, k), generator=torch.Generator().manual_seed(seed)) - 1
        mean = _spread(noise, (image_size, image_size)).abs().mean((-2, -1), keepdim=True)
        return cls(noise * strength / (mean * image_size))


def _spread(field: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the field at every pixel: shape [2, *size] or [K, 2, *size]."""
    batch = field.reshape(-1, *field.shape[-3:])
    return interpolate(batch, size=size, mode="bicubic", align_corners=True).reshape(*field.shape[:-2], *size)
