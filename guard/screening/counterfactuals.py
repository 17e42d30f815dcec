"""Images as they would be without a trigger, or without a part. numpy only, without random choices."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from guard._types import Floats
from guard.triggers.forms import check_tensors
from guard.triggers.numpy_apply import DISPLACEMENTS, pixels, resampled, sampled, warp_field

Undo = Callable[[Floats], Floats]
"""A function from an image, shape [3, H, W], values in [0, 1], to the same image without the trigger."""

_OPAQUE = 0.5
"""Opacity above which a pixel cannot be recovered and is filled from its surroundings."""
_MOST_OPAQUE = 0.95
"""Opacity above which a blend cannot be inverted: the rounding to bytes is amplified more than 20 times."""
_MARGIN = 1 / 16
"""Margin around the opaque part of a patch that is filled too, relative to the side of the image. Trigger inversion
finds only the few pixels of a patch that it needs; the attacker's own patch is larger."""
_MOST_LOST = 0.5
"""Share of the image above which a patch and its margin leave too little to fill them from."""
_STEPS = 12
"""Steps of a fixed-point iteration; each step about halves the remaining error."""
_DEPEND_ON_IMAGE = {"colour map", "generator"}
"""Families whose displacement depends on the image, so that it is undone step by step."""


def undoing(family: str, tensors: Mapping[str, Floats]) -> Undo | None:
    """Return a function that undoes a trigger of `guard.triggers`, as far as that is possible.

    - patch: where the mask is above 0.5 the image is lost; this, and a margin of 1/16 of the side around it, is filled
      from its surroundings. Elsewhere it is inverted like a blend.
    - blend: (y − alpha · pattern) / (1 − alpha).
    - additive, frequency, colour map, generator: x + d(x) = y is solved for x by a damped fixed-point iteration. A
      value at 0 or 1 that d moved there was perhaps clipped; it stays, since nothing says how far beyond it was.
    - warp: the places themselves are inverted by such an iteration, then sampled.

    Args:
        family: Name of the family.
        tensors: The trigger, as in `triggers.safetensors`; at any resolution.

    Returns:
        The function, or None for a family that cannot be undone or is unknown, or a trigger that hides the image.

    Raises:
        ValueError: The tensors are not those of a trigger of the family; the message is one line, for the caller to put
            the name of the trigger before it.
    """
    if family not in _UNDOINGS:
        return None
    check_tensors(family, tensors)
    return _UNDOINGS[family](tensors)


def fill(images: Floats, regions: NDArray[np.bool_]) -> Floats:
    """Fill regions smoothly from their surroundings; all other values stay the same.

    Means of what is known are pulled to coarser and coarser grids until no hole is left, and pushed back into the
    holes (Gortler et al., The Lumigraph, SIGGRAPH 1996, without their partial weights). Its cost is that of a few
    passes over the image, however large the region.

    Args:
        images: Shape [N, 3, H, W].
        regions: Mask of the regions to fill, shape [N, H, W] or [1, H, W].

    Raises:
        ValueError: A region is the whole image.
    """
    if regions.all((-2, -1)).any():
        raise ValueError("nothing is left of an image to fill it from")
    known = ~regions[:, None]
    filled: Floats = np.where(known, images, _pull_push(images * known, known.astype(np.float32)))
    return filled


def boxes(size: tuple[int, int], count: int, share: float) -> tuple[tuple[int, int, int, int], ...]:
    """Rectangles on an even grid that covers the image.

    Args:
        size: Height and width of the image.
        count: Rectangles along each side of the grid.
        share: Side of a rectangle relative to that of the image, in (0, 1).

    Returns:
        count² times first row, row after the last, first column, column after the last; row by row.
    """
    spans = []
    for side in size:
        length = max(1, round(share * side))
        starts = np.linspace(0, side - length, count).round().astype(int)
        spans.append([(int(start), int(start) + length) for start in starts])
    return tuple((*rows, *columns) for rows in spans[0] for columns in spans[1])


def low_pass(images: Floats, share: float) -> Floats:
    """Remove detail smaller than a share of the side, by scaling down and up again (bilinear).

    Args:
        images: Shape [N, 3, H, W].
        share: Size of the smallest detail that stays, relative to the side, in (0, 1].
    """
    size = images.shape[-2:]
    small = (max(1, round(1 / share)), max(1, round(1 / share)))
    return resampled(resampled(images, small), size)


def _patch(tensors: Mapping[str, Floats]) -> Undo | None:
    if _lost(tensors["mask"]).mean() > _MOST_LOST:
        return None

    def undo(image: Floats) -> Floats:
        size = image.shape[-2:]
        mask, pattern = resampled(tensors["mask"], size), resampled(tensors["pattern"], size)
        unblended = _unblended(image, np.minimum(mask, _OPAQUE), pattern)
        filled: Floats = fill(unblended[None], _lost(mask)[None])[0]
        return filled

    return undo


def _lost(mask: Floats) -> NDArray[np.bool_]:
    return _grown(mask[0] > _OPAQUE, math.ceil(_MARGIN * max(mask.shape)))


def _blend(tensors: Mapping[str, Floats]) -> Undo | None:
    if tensors["alpha"].item() > _MOST_OPAQUE:
        return None
    return lambda image: _unblended(image, tensors["alpha"], resampled(tensors["pattern"], image.shape[-2:]))


def _displaced(family: str, tensors: Mapping[str, Floats]) -> Undo:
    displacement = DISPLACEMENTS[family](tensors)
    steps = _STEPS if family in _DEPEND_ON_IMAGE else 1
    return lambda image: _unmoved(image, displacement, steps=steps)


def _warp(tensors: Mapping[str, Floats]) -> Undo:
    def undo(image: Floats) -> Floats:
        along, place = warp_field(tensors, image.shape[-2:]), pixels(image.shape[-2:])
        found = place
        for _ in range(_STEPS):
            found = ((found + place - sampled(along, found)) / 2).astype(np.float32)
        return sampled(image, found)

    return undo


_UNDOINGS: dict[str, Callable[[Mapping[str, Floats]], Undo | None]] = {
    "patch": _patch,
    "large patch": _patch,
    "blend": _blend,
    "warp": _warp,
    **{family: partial(_displaced, family) for family in DISPLACEMENTS},
}


def _unblended(image: Floats, opacity: Floats, pattern: Floats) -> Floats:
    inverted: Floats = np.clip((image - opacity * pattern) / (1 - opacity), 0, 1).astype(np.float32)
    return inverted


def _unmoved(image: Floats, displacement: Callable[[Floats], Floats], *, steps: int) -> Floats:
    found = image
    for step in range(steps):
        moved = displacement(found)
        clipped = ((image <= 0) & (moved < 0)) | ((image >= 1) & (moved > 0))
        solved = np.where(clipped, image, np.clip(image - moved, 0, 1)).astype(np.float32)
        found = ((found + solved) / 2).astype(np.float32) if step else solved
    return found


def _grown(region: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    for axis in (0, 1):
        padded = np.pad(region, [(margin, margin) if axis == side else (0, 0) for side in (0, 1)])
        region = np.asarray(sliding_window_view(padded, 2 * margin + 1, axis).any(-1))
    return region


def _pull_push(sums: Floats, weights: Floats) -> Floats:
    """Values with every hole filled; `sums` are values times weights, shape [N, C, H, W] and [N, 1, H, W]."""
    means: Floats = (sums / np.maximum(weights, 1e-12)).astype(np.float32)
    if (weights > 0).all():
        return means
    height, width = sums.shape[-2:]
    coarse = _pull_push(_halved(sums), _halved(weights))
    size = (2 * coarse.shape[-2], 2 * coarse.shape[-1])
    filled: Floats = np.where(weights > 0, means, resampled(coarse, size)[..., :height, :width])
    return filled


def _halved(values: Floats) -> Floats:
    height, width = values.shape[-2:]
    even = np.pad(values, ((0, 0), (0, 0), (0, height % 2), (0, width % 2)))
    halved: Floats = even.reshape(*even.shape[:2], even.shape[2] // 2, 2, even.shape[3] // 2, 2).sum((3, 5))
    return halved
