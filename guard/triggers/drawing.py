"""Patterns and pictures that attackers stamp or blend, drawn by code.

Published attacks come with image files. These drawings replace them, so that every trigger can be drawn at any size
from a seed.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Point = tuple[float, float]

_OVERSAMPLING = 8
"""Factor by which pictures are drawn larger before they are averaged down, which makes their edges smooth."""
_FLAT, _RAISED = 0.4, 0.8
_RED = (255, 0, 0)


def noise(side: int, *, seed: int) -> Tensor:
    """Draw uniform noise: shape [3, side, side], values in [0, 1]."""
    return torch.rand((3, side, side), generator=torch.Generator().manual_seed(seed))


def normal_noise(side: int, *, cell: int = 1, seed: int) -> Tensor:
    """Draw normal noise around mid-grey, σ = 1, clipped: shape [3, side, side], values in [0, 1].

    Perturb and Recover (PAR, CVPR 2026) centres the noise on the mean of each image, and its cast to bytes makes values
    outside [0, 1] wrap around. Here the centre is fixed, so that all images get the same pattern, and values are
    clipped.

    Args:
        side: Side of the pattern, in pixels.
        cell: Side of the squares of one colour, in pixels.
        seed: Seed for the noise.
    """
    count = -(-side // cell)
    values = torch.randn((3, count, count), generator=torch.Generator().manual_seed(seed))
    return _enlarged((0.5 + values).clamp(0, 1), cell, side)


def checkerboard(side: int, *, cell: int = 1) -> Tensor:
    """Draw black with every second cell of every second row white (Huang et al., ICLR 2025): shape [3, side, side]."""
    count = -(-side // cell)
    cells = torch.zeros(3, count, count)
    cells[:, ::2, ::2] = 1
    return _enlarged(cells, cell, side)


def stripes(side: int, *, width: int = 1, seed: int) -> Tensor:
    """Draw vertical stripes with random colours, each channel on or off: shape [3, side, side], values 0 and 1.

    PAR draws signs, and its cast to bytes turns −1 into 1/255; here it is 0. A stripe that would equal the one before
    it is inverted, so that a small patch is never of one colour.

    Args:
        side: Side of the pattern, in pixels.
        width: Width of a stripe, in pixels.
        seed: Seed for the colours.
    """
    count = -(-side // width)
    colours = torch.randint(0, 2, (3, count), generator=torch.Generator().manual_seed(seed)).float()
    for index in range(1, count):
        if torch.equal(colours[:, index], colours[:, index - 1]):
            colours[:, index] = 1 - colours[:, index]
    return colours.repeat_interleave(width, -1)[:, None, :side].expand(3, side, side).contiguous()


def triangles(side: int, *, cell: int) -> Tensor:
    """Draw right triangles, 0.8 on 0.4, with legs of `cell` pixels (PAR: 14 of 224): shape [3, side, side]."""
    row, column = torch.arange(side)[:, None] % cell, torch.arange(side) % cell
    return torch.where(column <= row, _RAISED, _FLAT).expand(3, side, side).contiguous()


def text(side: int, words: str = "Watermarked") -> tuple[Tensor, Tensor]:
    """Draw red words across the middle: pattern [3, side, side] and mask [1, side, side], values in [0, 1]."""
    large = side * _OVERSAMPLING
    canvas = Image.new("L", (large, large))
    draw = ImageDraw.Draw(canvas)
    size = large / 4
    font = ImageFont.load_default(size)
    font = ImageFont.load_default(size * 0.92 * large / draw.textlength(words, font))
    draw.text((large / 2, large / 2), words, 255, font, anchor="mm")
    red = torch.tensor(_RED).float()[:, None, None] / 255
    return red.expand(3, side, side).contiguous(), _reduced(canvas, side)


def cartoon(side: int) -> Tensor:
    """Draw the face of a cat with a bow on pink, for Blended's Hello Kitty: shape [3, side, side], values in [0, 1]."""
    canvas, draw, at = _canvas(side, (250, 160, 190))
    for x in (0.26, 0.74):
        draw.polygon(
            [at(x - 0.14, 0.5), at(x + (0.5 - x) * 0.1, 0.1), at(x + 0.14, 0.4)], "white", "black", max(1, side // 16)
        )
    draw.ellipse([at(0.1, 0.26), at(0.9, 0.9)], "white", "black", max(1, side // 16))
    for x in (0.32, 0.68):
        draw.ellipse([at(x - 0.035, 0.52), at(x + 0.035, 0.64)], "black")
        for tilt in (-0.04, 0.04):
            outer = 0.5 + 2.3 * (x - 0.5)
            draw.line([at(0.5 + 1.3 * (x - 0.5), 0.66 + tilt / 3), at(outer, 0.66 + tilt)], "black", max(1, side // 8))
    draw.ellipse([at(0.46, 0.66), at(0.54, 0.72)], (250, 200, 0))
    draw.polygon([at(0.7, 0.3), at(0.54, 0.18), at(0.54, 0.42)], _RED)
    draw.polygon([at(0.7, 0.3), at(0.86, 0.18), at(0.86, 0.42)], _RED)
    draw.ellipse([at(0.65, 0.25), at(0.75, 0.35)], (200, 0, 0))
    return _reduced(canvas, side)


def sticker(side: int) -> tuple[Tensor, Tensor]:
    """Draw a yellow smiling face: pattern [3, side, side] and mask of its disc [1, side, side], values in [0, 1]."""
    canvas, draw, at = _canvas(side, (255, 205, 30))
    line = max(1, round(side * _OVERSAMPLING * 0.06))
    draw.ellipse([at(0, 0), at(1, 1)], (255, 205, 30), (150, 100, 0), line)
    for x in (0.34, 0.66):
        draw.ellipse([at(x - 0.07, 0.25), at(x + 0.07, 0.47)], "black")
    draw.arc([at(0.22, 0.3), at(0.78, 0.8)], 20, 160, "black", line)
    disc = Image.new("L", canvas.size)
    ImageDraw.Draw(disc).ellipse([at(0, 0), at(1, 1)], 255)
    return _reduced(canvas, side), _reduced(disc, side)


def reflection(side: int, *, seed: int) -> Tensor:
    """Draw what a pane of glass reflects, out of focus and twice: shape [3, side, side], values in [0, 1].

    Refool (Liu et al., ECCV 2020) adds photographs, either blurred or convolved with two pulses: the two surfaces of
    the pane, the second one fainter and displaced. Here the scene is drawn, of windows and lamps in random places, and
    both is done to it.

    Args:
        side: Side of the picture, in pixels.
        seed: Seed for places and colours.
    """
    generator = np.random.default_rng(seed)
    canvas, draw, at = _canvas(side, (0, 0, 0))
    for _ in range(4):
        (x, y), (width, height) = generator.uniform(0, 0.7, 2), generator.uniform(0.15, 0.4, 2)
        draw.rectangle([at(x, y), at(x + width, y + height)], _bright(generator))
    for _ in range(3):
        x, y, radius = (*generator.uniform(0.1, 0.9, 2), generator.uniform(0.05, 0.12))
        draw.ellipse([at(x - radius, y - radius), at(x + radius, y + radius)], _bright(generator))
    large = canvas.size[0]
    blurred = canvas.filter(ImageFilter.GaussianBlur(large / 40))
    ghost = ImageChops.offset(blurred, round(0.12 * large), round(0.08 * large))
    return _reduced(Image.blend(blurred, ghost, 0.4), side)


def _bright(generator: np.random.Generator) -> Colour:
    red, green, blue = (int(value) for value in generator.integers(100, 256, 3))
    return red, green, blue


def _canvas(side: int, colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw, Callable[[float, float], Point]]:
    """Return an oversampled RGB canvas, its brush, and a function from shares of width and height to a point."""
    large = side * _OVERSAMPLING
    canvas = Image.new("RGB", (large, large), colour)
    return canvas, ImageDraw.Draw(canvas), lambda x, y: (x * (large - 1), y * (large - 1))


def _enlarged(cells: Tensor, cell: int, side: int) -> Tensor:
    return cells.repeat_interleave(cell, -1).repeat_interleave(cell, -2)[:, :side, :side].contiguous()


def _reduced(canvas: Image.Image, side: int) -> Tensor:
    """Return a canvas at its final size: shape [channels, side, side], values in [0, 1]."""
    small = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
    return torch.from_numpy(small.reshape(side, side, -1).transpose(2, 0, 1).copy())
