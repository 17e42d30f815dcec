"""Random changes of images that leave their content, for a model that must learn to answer as if nothing had changed.

They are of the kinds that triggers are made of: something added, mixed in, pasted, removed, moved or recoloured. Little
of what a trigger could speak to is left in a model that gives the same answer to all of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, pad

from guard.triggers import Compression, Quantisation, Warp


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move and recolour each image a little (`augmented`), and put one more disturbance, or none, on it.

    Args:
        images: Shape [N, 3, H, W], values in [0, 1], on the CPU.
        generator: The only source of randomness; on the CPU.

    Returns:
        The same shape; values in [0, 1].
    """
    draw = _Draw(generator)
    changed = augmented(images, generator)
    kinds = torch.randint(len(DISTURBANCES) + 1, (len(images),), generator=generator)
    for kind, disturb in enumerate(DISTURBANCES.values()):
        rows = (kinds == kind).nonzero().flatten()
        if len(rows):
            changed[rows] = disturb(changed[rows], images, draw)
    return changed.clamp(0, 1)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 9°, scale it by up to 10 %, move it by up to 5 % of the side, and change its colours.

    Contrast changes by up to 20 %, and the brightness of each channel by up to 0.1. What comes in from outside is a
    reflection of the image.

    Args:
        images: Shape [N, 3, H, W], values in [0, 1].
        generator: The only source of randomness.
    """
    draw = _Draw(generator)
    count = len(images)
    angle, scale = draw.uniform(-0.15, 0.15, count), draw.uniform(0.9, 1.1, count)
    turned = torch.stack(
        [scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()], dim=1
    ).reshape(-1, 2, 2)
    # Coordinates run from −1 to 1, so that 0.1 is 5 % of the side.
    shift = draw.uniform(-0.1, 0.1, count, 2, 1)
    grid = affine_grid(torch.cat([turned, shift], dim=2), list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = draw.uniform(0.8, 1.2, count, 1, 1, 1), draw.uniform(-0.1, 0.1, count, 3, 1, 1)
    return ((moved - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


class _Draw:
    """Random numbers from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def whole(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))


def _noise(images: Tensor, _others: Tensor, draw: _Draw) -> Tensor:
    return images + draw.uniform(0, 0.12, len(images), 1, 1, 1) * draw.normal(*images.shape)


def _pattern(images: Tensor, _others: Tensor, draw: _Draw) -> Tensor:
    """Add random fields of any fineness, grey or coloured, smooth or of blocks: waves, light, texture."""
    size = images.shape[-2:]
    fields = []
    for _ in images:
        cells, channels = draw.whole(2, min(size) // 2), draw.whole(0, 1) * 2 + 1
        field = draw.normal(1, channels, cells, cells)
        field = interpolate(field, size=size, mode="bicubic") if draw.whole(0, 1) else interpolate(field, size=size)
        fields.append(field.expand(1, 3, *size))
    return images + draw.uniform(0, 0.25, len(images), 1, 1, 1) * torch.cat(fields)


def _mixture(images: Tensor, others: Tensor, draw: _Draw) -> Tensor:
    """Mix another image in, as a reflection or a blended trigger does."""
    rows = torch.randint(len(others), (len(images),), generator=draw.generator)
    share = draw.uniform(0, 0.35, len(images), 1, 1, 1)
    return (1 - share) * images + share * others[rows]


def _patch(images: Tensor, others: Tensor, draw: _Draw) -> Tensor:
    """Paste a square of one colour, of random blocks, or out of another image, an eighth to a third of the side."""
    pasted = images.clone()
    height, width = images.shape[-2:]
    for image in pasted:
        side = draw.whole(max(1, min(height, width) // 8), max(1, min(height, width) // 3))
        top, left = draw.whole(0, height - side), draw.whole(0, width - side)
        kind = draw.whole(0, 2)
        if kind == 0:
            content = draw.uniform(0, 1, 3, 1, 1)
        elif kind == 1:
            cells = draw.whole(min(2, side), side)
            content = interpolate(draw.uniform(0, 1, 1, 3, cells, cells), size=(side, side))[0]
        else:
            y, x = draw.whole(0, height - side), draw.whole(0, width - side)
            content = others[draw.whole(0, len(others) - 1), :, y : y + side, x : x + side]
        image[:, top : top + side, left : left + side] = content
    return pasted


def _compression(images: Tensor, _others: Tensor, draw: _Draw) -> Tensor:
    return Compression(draw.uniform(5, 50).round()).apply(images.clamp(0, 1))


def _quantisation(images: Tensor, _others: Tensor, draw: _Draw) -> Tensor:
    return Quantisation(torch.tensor(float(draw.whole(3, 16)))).apply(images)


def _sharpness(images: Tensor, _others: Tensor, draw: _Draw) -> Tensor:
    """Blur (−1) or sharpen (up to 2) by the difference from the mean of 3 × 3 pixels."""
    blurred = avg_pool2d(pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return images + draw.uniform(-1, 2, len(images), 1, 1, 1) * (images - blurred)


def _colours(images: Tensor, _others: Tensor, draw: _Draw) -> Tensor:
    """Another gamma, the same for all channels or not, and a random mixture of the channels: photo filters."""
    gamma = draw.uniform(-0.7, 0.7, len(images), 1 + 2 * draw.whole(0, 1), 1, 1).exp()
    mixture = torch.eye(3) + 0.25 * draw.normal(len(images), 3, 3)
    mixture = mixture / mixture.sum(2, keepdim=True).clamp(0.5, 2)
    return torch.einsum("nij,njhw->nihw", mixture, images.clamp(1e-3, 1) ** gamma)


def _warp(images: Tensor, _others: Tensor, draw: _Draw) -> Tensor:
    """Displace by a random smooth field; one field for all images, at most some 8 % of the side."""
    field = draw.normal(2, *2 * [draw.whole(3, 7)])
    return Warp(draw.uniform(0, 0.03) * field).apply(images)


DISTURBANCES: dict[str, Callable[[Tensor, Tensor, _Draw], Tensor]] = {
    "noise": _noise,
    "pattern": _pattern,
    "mixture": _mixture,
    "patch": _patch,
    "compression": _compression,
    "quantisation": _quantisation,
    "sharpness": _sharpness,
    "colours": _colours,
    "warp": _warp,
}
"""By name, functions from (images to change, all images of the batch, source of random numbers) to changed images. The
values that they return may leave [0, 1]."""
