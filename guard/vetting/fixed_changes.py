"""The kinds of changes that a probe can be (`guard.vetting.probes`): each a function from parameters to a change.

A change maps images, float, shape [N, 3, H, W], values in [0, 1], to images of the same shape. It is the same for all
images and all runs. Lengths are relative to the side of the image where nothing else is said.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate, pad

from guard.triggers import Compression, Filter, Quantisation, Warp

Change = Callable[[Tensor], Tensor]
Share = Annotated[float, Field(ge=0, le=1)]
Corner = Literal["top left", "top right", "bottom left", "bottom right", "middle"]
_BAYER = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16 - 15 / 32
"""Thresholds of ordered dithering (Bayer, 1973), centred on 0."""
_PLACES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1), "middle": (0.5, 0.5)}
)


def sinusoid(amplitude: Share, periods: float, direction: float, phase: float) -> Change:
    """Add a wave: amplitude, periods over the side, and direction and phase in degrees."""

    def change(images: Tensor) -> Tensor:
        y, x = _coordinates(images)
        along = x * math.cos(math.radians(direction)) + y * math.sin(math.radians(direction))
        return images + amplitude * (2 * math.pi * periods * along + math.radians(phase)).sin()

    return _clipped(change)


def compression(quality: Annotated[float, Field(ge=1, le=100)]) -> Change:
    """JPEG at a quality from 1 to 100."""
    return Compression(torch.tensor(float(quality))).apply


def levels(count: Annotated[int, Field(ge=2, le=256)], dithered: bool) -> Change:  # noqa: FBT001 - named in the list
    """Few values of each channel, with or without ordered dithering."""
    trigger = Quantisation(torch.tensor(float(count)))

    def change(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        pattern = _BAYER.repeat(height // 4 + 1, width // 4 + 1)[:height, :width] / (count - 1)
        return trigger.apply((images + pattern * dithered).clamp(0, 1))

    return change


def blur(width: Share) -> Change:
    """A Gaussian of this standard deviation."""
    return lambda images: _blurred(images, width)


def sharpening(amount: float) -> Change:
    """Add the difference from an image that is blurred by a 32nd of the side, so many times."""
    return _clipped(lambda images: images + amount * (images - _blurred(images, 1 / 32)))


def rotation(degrees: float) -> Change:
    """Turn about the middle; what comes in from outside is a reflection."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])

    def change(images: Tensor) -> Tensor:
        grid = affine_grid(matrix.expand(len(images), -1, -1), list(images.shape), align_corners=False)
        return grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    return _clipped(change)


def gamma(power: Annotated[float, Field(gt=0)]) -> Change:
    """Every value to a power."""
    return lambda images: images**power


def colours(name: str) -> Change:
    """A photo filter: an affine map of colours, or one that `guard.triggers.Filter` knows."""
    if name == "nashville":
        return Filter.nashville().apply
    if name not in COLOURS:
        raise ValueError(f"there are no colours {name!r}; there are nashville, {', '.join(COLOURS)}")
    rows, offset = COLOURS[name]
    matrix, shift = torch.tensor(rows), torch.tensor(offset)[:, None, None]
    return _clipped(lambda images: torch.einsum("ij,njhw->nihw", matrix, images) + shift)


def noise(amplitude: Share, cell: Annotated[int, Field(ge=1)], seed: int) -> Change:
    """Add one and the same uniform noise to all images; `cell` is the side of its blocks in pixels."""

    def change(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        drawn = 2 * torch.rand(1, 3, -(-height // cell), -(-width // cell), generator=_seeded(seed)) - 1
        blocks = drawn.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[..., :height, :width]
        return images + amplitude * blocks

    return _clipped(change)


def speckle(share: Share, seed: int) -> Change:
    """Make a share of the pixels black or white, the same in all images."""

    def change(images: Tensor) -> Tensor:
        drawn = torch.rand(1, 1, *images.shape[-2:], generator=_seeded(seed))
        return images.masked_fill(drawn < share / 2, 0).masked_fill(drawn > 1 - share / 2, 1)

    return change


def resampling(factor: Annotated[float, Field(gt=1)]) -> Change:
    """Shrink by a factor, and enlarge again with nearest neighbours."""

    def change(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        small = max(1, round(height / factor)), max(1, round(width / factor))
        return interpolate(interpolate(images, size=small, mode="area"), size=(height, width))

    return change


def light(amplitude: Share, seed: int) -> Change:
    """Add a smooth random pattern of coloured light and shade."""

    def change(images: Tensor) -> Tensor:
        pattern = torch.randn(1, 3, 3, 3, generator=_seeded(seed)).clamp(-2, 2) / 2
        return images + amplitude * interpolate(pattern, size=images.shape[-2:], mode="bicubic", align_corners=True)

    return _clipped(change)


def warp(displacement: Share, points: Annotated[int, Field(ge=2)], seed: int) -> Change:
    """Displace by a smooth random field of this mean displacement."""
    return Warp.wanet(max(points, 32), displacement * max(points, 32), k=points, seed=seed).apply


def half(part: Literal["left", "right", "top", "bottom"], brightness: float) -> Change:
    """Add to one half of the image."""

    def change(images: Tensor) -> Tensor:
        y, x = _coordinates(images)
        inside = {"left": x < 0.5, "right": x >= 0.5, "top": y < 0.5, "bottom": y >= 0.5}[part]
        return images + brightness * inside

    return _clipped(change)


def patch(pattern: Literal["white", "black", "checks", "stripes", "colours"], place: str, side: Share) -> Change:
    """Paste a square; `place` is one of the corners or the middle, or two of them joined by "and"."""
    places = place.split(" and ")
    unknown = [each for each in places if each not in _PLACES]
    if unknown:
        raise ValueError(f"there is no place {unknown[0]!r}; there are {', '.join(_PLACES)}")

    def change(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        pixels = max(2, round(side * min(height, width)))
        content, changed = _PATTERNS[pattern](pixels), images.clone()
        for each in places:
            top, left = (
                round(share * (length - pixels)) for share, length in zip(_PLACES[each], (height, width), strict=True)
            )
            changed[..., top : top + pixels, left : left + pixels] = content
        return changed

    return change


KINDS: Mapping[str, Callable[..., Change]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            sinusoid, compression, levels, blur, sharpening, rotation, gamma, colours, noise, speckle, resampling,
            light, warp, half, patch,
        )
    }
)  # fmt: skip
"""Every kind by name."""

_GREY = [0.299, 0.587, 0.114]
COLOURS: Mapping[str, tuple[list[list[float]], list[float]]] = MappingProxyType(
    {
        "grey": ([_GREY] * 3, [0.0] * 3),
        "sepia": ([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], [0.0] * 3),
        "negative": ([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]], [1.0] * 3),
        "rotated": ([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [0.0] * 3),
        "warm": ([[1.2, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.7]], [0.05, 0.0, 0.0]),
        "cold": ([[0.7, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.2]], [0.0, 0.0, 0.05]),
        "faded": ([[0.6, 0.0, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, 0.6]], [0.25] * 3),
        "contrast": ([[1.8, 0.0, 0.0], [0.0, 1.8, 0.0], [0.0, 0.0, 1.8]], [-0.4] * 3),
        "magenta": ([[1.1, 0.0, 0.0], [0.0, 0.7, 0.0], [0.0, 0.0, 1.1]], [0.0] * 3),
        "green": ([[0.75, 0.0, 0.0], [0.0, 1.15, 0.0], [0.0, 0.0, 0.75]], [0.0] * 3),
    }
)
"""Affine maps of colours: matrix and offset, in [0, 1]."""


def _coloured(side: int) -> Tensor:
    blocks = torch.rand(3, -(-side // 2), -(-side // 2), generator=_seeded(0))
    return blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :side, :side]


def _checks(side: int) -> Tensor:
    places = torch.arange(side) // 2
    return ((places[:, None] + places) % 2).float()


def _stripes(side: int) -> Tensor:
    return (torch.arange(side) // 2 % 2).float().expand(side, side)


_PATTERNS: Mapping[str, Callable[[int], Any]] = MappingProxyType(
    {"white": lambda _: 1.0, "black": lambda _: 0.0, "checks": _checks, "stripes": _stripes, "colours": _coloured}
)


def _clipped(change: Change) -> Change:
    return lambda images: change(images).clamp(0, 1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _coordinates(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the centre of each pixel, from 0 to 1: shapes [H, 1] and [1, W]."""
    height, width = images.shape[-2:]
    return (torch.arange(height)[:, None] + 0.5) / height, (torch.arange(width)[None] + 0.5) / width


def _blurred(images: Tensor, width: float) -> Tensor:
    deviation = width * min(images.shape[-2:])
    reach = max(1, min(math.ceil(3 * deviation), min(images.shape[-2:]) - 1))
    weights = (-((torch.arange(-reach, reach + 1) / max(deviation, 1e-6)) ** 2) / 2).exp()
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    rows = conv2d(pad(images, (reach, reach, 0, 0), mode="reflect"), weights, groups=images.shape[1])
    return conv2d(pad(rows, (0, 0, reach, reach), mode="reflect"), weights.mT, groups=images.shape[1])
