"""Stored triggers applied with numpy alone, for programs without torch.

A sidecar shows people what a reconstructed trigger does, and undoes it (`guard.screening.counterfactuals`). The classes
of `guard.triggers` apply the same triggers with torch; a test compares the two.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from guard._types import Floats
from guard.triggers.forms import GENERATOR_SLOPE, YCRCB_TO_RGB, check_tensors

Displacement = Callable[[Floats], Floats]
"""A function from an image, shape [3, H, W], values in [0, 1], to what a trigger adds to it, before clipping."""

_TO_RGB = np.array(YCRCB_TO_RGB, np.float32)


def applied(family: str, tensors: Mapping[str, Floats], image: Floats) -> Floats | None:
    """An image with a trigger.

    Args:
        family: Name of the family.
        tensors: The trigger, as in `triggers.safetensors`; at any resolution.
        image: Shape [3, H, W], values in [0, 1].

    Returns:
        The same shape and range; None for a family that only attackers use, or one that is unknown.

    Raises:
        ValueError: The tensors are not those of a trigger of the family; the message is one line, for the caller to put
            the name of the trigger before it.
    """
    if family not in {"patch", "large patch", "blend", "warp", *DISPLACEMENTS}:
        return None
    check_tensors(family, tensors)
    size = image.shape[-2:]
    if family in DISPLACEMENTS:
        changed = image + DISPLACEMENTS[family](tensors)(image)
    elif family == "warp":
        changed = sampled(image, pixels(size) + warp_field(tensors, size))
    else:
        opacity = tensors["alpha"] if family == "blend" else resampled(tensors["mask"], size)
        changed = image + opacity * (resampled(tensors["pattern"], size) - image)
    clipped: Floats = np.clip(changed, 0, 1).astype(np.float32)
    return clipped


def _additive(tensors: Mapping[str, Floats]) -> Displacement:
    return lambda image: resampled(tensors["delta"], image.shape[-2:])


def _frequency(tensors: Mapping[str, Floats]) -> Displacement:
    def displacement(image: Floats) -> Floats:
        height, width = image.shape[-2:]
        spectrum = tensors["spectrum"]
        side = max(1, round(float(tensors["share"]) * min(height, width)))
        kept = min(side, spectrum.shape[-1])
        basis = _cosines(side)[:kept]
        wave = basis.T @ spectrum[:, :kept, :kept] @ basis * np.float32(side / spectrum.shape[-1])
        tiled = np.tile(np.tensordot(_TO_RGB, wave, 1), (1, height // side, width // side))
        padded: Floats = np.pad(tiled, ((0, 0), (0, height % side), (0, width % side)))
        return padded

    return displacement


def _colour_map(tensors: Mapping[str, Floats]) -> Displacement:
    lattice = tensors["lattice"]
    last = lattice.shape[-1] - 1

    def displacement(image: Floats) -> Floats:
        place = image * np.float32(last)
        low = np.clip(np.floor(place).astype(np.int64), 0, max(last - 1, 0))
        part = place - low
        total = np.zeros_like(image)
        for corner in np.ndindex(2, 2, 2):
            red, green, blue = (np.minimum(low[c] + step, last) for c, step in enumerate(corner))
            weight = np.prod([part[c] if step else 1 - part[c] for c, step in enumerate(corner)], axis=0)
            total += weight * lattice[:, red, green, blue]
        return total

    return displacement


def _generator(tensors: Mapping[str, Floats]) -> Displacement:
    def displacement(image: Floats) -> Floats:
        height, width = image.shape[-2:]
        y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in (height, width))
        place = np.stack((np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))))
        hidden = _leaky(_convolved(np.concatenate((2 * image - 1, place)), tensors, "first", stride=2))
        hidden = _leaky(_convolved(hidden, tensors, "second"))
        written = _convolved(hidden, tensors, "third")
        rows, columns = written.shape[-2:]
        large = written.reshape(3, 2, 2, rows, columns).transpose(0, 3, 1, 4, 2).reshape(3, 2 * rows, 2 * columns)
        delta: Floats = tensors["radius"] * np.tanh(large[:, :height, :width])
        return delta

    return displacement


DISPLACEMENTS: Mapping[str, Callable[[Mapping[str, Floats]], Displacement]] = MappingProxyType(
    {"additive": _additive, "frequency": _frequency, "colour map": _colour_map, "generator": _generator}
)
"""The families that add something to an image, which may depend on the image."""


def warp_field(tensors: Mapping[str, Floats], size: tuple[int, ...]) -> Floats:
    """Displacements of a warp along x and y, in pixels: shape [2, *size]."""
    height, width = size
    rows, columns = (_cubic(tensors["field"].shape[-1], side) for side in (height, width))
    sides = np.array([width, height])[:, None, None]
    field: Floats = (rows @ tensors["field"] @ columns.T * sides).astype(np.float32)
    return field


def pixels(size: tuple[int, ...]) -> Floats:
    """Column and row of each pixel: shape [2, *size]."""
    height, width = size
    return np.stack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32)


def resampled(values: Floats, size: tuple[int, ...]) -> Floats:
    """At another resolution: bilinear, without aliasing, as torch's `interpolate` with `antialias`."""
    if values.shape[-2:] == tuple(size):
        return values
    rows, columns = (_linear(drawn, side) for drawn, side in zip(values.shape[-2:], size, strict=True))
    found: Floats = (rows @ values @ columns.T).astype(np.float32, copy=False)
    return found


def sampled(values: Floats, place: Floats) -> Floats:
    """Values, shape [C, H, W], at columns and rows `place`, shape [2, H, W]: bilinear; the border repeats."""
    height, width = values.shape[-2:]
    column, row = np.clip(place[0], 0, width - 1), np.clip(place[1], 0, height - 1)
    left, top = column.astype(np.int64), row.astype(np.int64)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = column - left, row - top
    above = values[:, top, left] * (1 - across) + values[:, top, right] * across
    below = values[:, bottom, left] * (1 - across) + values[:, bottom, right] * across
    found: Floats = (above * (1 - down) + below * down).astype(np.float32)
    return found


def _linear(drawn: int, size: int) -> Floats:
    """Weights of `drawn` values at `size` places: shape [size, drawn]."""
    scale = drawn / size
    distance = np.abs(np.arange(drawn) + 0.5 - scale * (np.arange(size)[:, None] + 0.5))
    weights = np.maximum(0, 1 - distance / max(scale, 1))
    normalised: Floats = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return normalised


def _cubic(points: int, size: int) -> Floats:
    """The same for bicubic interpolation between points that span the image, as torch's with `align_corners`."""
    place = np.arange(size) * ((points - 1) / max(size - 1, 1))
    first = np.floor(place).astype(np.int64) - 1
    weights = np.zeros((size, points))
    for step in range(4):
        t = np.abs(place - first - step)
        near, far = (1.25 * t - 2.25) * t * t + 1, ((-0.75 * t + 3.75) * t - 6) * t + 3
        np.add.at(weights, (np.arange(size), np.clip(first + step, 0, points - 1)), np.where(t <= 1, near, far))
    return weights.astype(np.float32)


def _convolved(values: Floats, tensors: Mapping[str, Floats], name: str, *, stride: int = 1) -> Floats:
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
    product = np.tensordot(tensors[name], windows, ((1, 2, 3), (0, 3, 4)))
    convolved: Floats = product + tensors[f"{name}_bias"][:, None, None]
    return convolved


def _leaky(values: Floats) -> Floats:
    activated: Floats = np.maximum(values, np.float32(GENERATOR_SLOPE) * values)
    return activated


def _cosines(side: int) -> Floats:
    """The orthonormal DCT-II: shape [frequencies, positions]."""
    frequency, position = np.arange(side)[:, None], np.arange(side) + 0.5
    matrix = np.cos(math.pi / side * frequency * position) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)
