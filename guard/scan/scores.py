"""How suspicious a pair is, from the neighbours of its image among other images of the set; larger is more suspicious.

The scores are those of Huang et al. (ICLR 2025; `guard.baselines.density` has their formulas): how thinly a reference
is populated around an image. They fail where the reference holds k images with the trigger, which are then each other's
neighbours. The reference of the released code is the batch that an image is loaded in, with its captions; `Sampled`
takes small random samples of all images instead, and averages over several.

As in the released code, embeddings are taken as the tower gives them and not normalised: in a model that was trained on
the poisoned set, an image with the trigger is often longer than any other (docs/methods.md has figures).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from guard._types import Floats, Rows
from guard.baselines.density import dao, dimension, released_dimension, slof
from guard.errors import DataError
from guard.scan.nearest import Embeddings, Found, Reference, sampled
from guard.scan.vectors import gathered

Scores = dict[str, NDArray[np.float64]]


class Sampled:
    """Random samples of all images as the reference.

    Args:
        parts: Embeddings of all images.
        size: Number of images in a sample.
        draws: Number of samples; scores are averaged over them.
        k: Number of neighbours.
        seed: Of the samples.
        device: Where neighbours are searched.

    Raises:
        DataError: There are too few images for k.
    """

    def __init__(
        self, parts: Sequence[Embeddings], size: int, draws: int, k: int, *, seed: int, device: torch.device
    ) -> None:
        count = sum(part.shape[0] for part in parts)
        if min(size, count) < k + 2:
            raise DataError(f"{count} pairs are too few for k = {k}; give more pairs, or a smaller --k")
        self._k = k
        self._banks = [_Bank(parts, sampled(count, size, (seed, draw)), k, device) for draw in range(draws)]

    def scores(self, queries: Floats, start: int) -> Scores:
        """k-distance, SLOF, LID and DAO of consecutive images, the first of which has this number in the set."""
        found = [bank.scores(queries, start) for bank in self._banks]
        return {name: np.mean([scores[name] for scores in found], axis=0) for name in found[0]}


class _Bank:
    """One sample, and what depends on it alone."""

    def __init__(self, parts: Sequence[Embeddings], rows: Rows, k: int, device: torch.device) -> None:
        self._rows, self._k = rows, k
        bank = gathered(parts, rows)
        self._reference = Reference([bank], device=device)
        within = self._reference.search(bank, k, without=np.arange(len(rows))[:, None]).distances
        self._radii, self._dimensions = within[:, -1], dimension(within)

    def scores(self, queries: Floats, start: int) -> Scores:
        numbers = np.arange(start, start + len(queries))
        places = np.minimum(np.searchsorted(self._rows, numbers), len(self._rows) - 1)
        itself = np.where(self._rows[places] == numbers, places, -1)[:, None]
        return density(self._reference.search(queries, self._k, without=itself), self._radii, self._dimensions)


def density(found: Found, radii: NDArray[np.floating], dimensions: NDArray[np.float64]) -> Scores:
    """The published scores by their formulas.

    Args:
        found: Neighbours of each image.
        radii: d_k of every row of the reference.
        dimensions: LID of every row of the reference.
    """
    distance = found.distances[:, -1]
    return {
        "k-distance": distance.astype(np.float64),
        "slof": slof(distance, radii[found.rows]),
        "lid": dimension(found.distances),
        "dao": dao(distance, radii[found.rows], dimensions[found.rows]),
    }


def released(image: Floats, text: Floats | None, k: int, *, device: torch.device | None = None) -> Scores:
    """The scores of one batch as the released code computes them, by image; see `guard.baselines.density`.

    The reference is the batch itself: its images and, with `text`, its captions, an image's own excepted.

    Args:
        image: Embeddings as the tower gives them, shape [B, D].
        text: Those of the captions; None for images alone.
        k: Number of neighbours.
        device: Where neighbours are searched.

    Raises:
        ValueError: The batch is too small for k.
    """
    size = len(image)
    own = np.arange(size)[:, None]
    if text is None:
        bank, without = image, own
    else:
        bank, without = np.concatenate([image, text]), np.hstack([own, own + size])
    reference = Reference([bank], device=device)
    found = reference.search(image, k + 1, without=without)
    within = reference.search(bank, k, without=np.arange(len(bank))[:, None]).distances
    radii = within[:, -1]
    itself = np.zeros((len(bank), 1), np.float32)
    dimensions = released_dimension(np.hstack([itself, within[:, :-1]]), within[:, -1:])
    # Its positions are those after the row's own image and caption were cut out, used to look up in the whole.
    near = found.rows[:, :k]
    near = near - (near > own) - (near > own + size)
    distance = found.distances[:, k]
    return {
        "k-distance": distance.astype(np.float64),
        "slof": slof(distance, radii[near], compat=True),
        "lid": released_dimension(found.distances[:, :k], found.distances[:, k:]),
        "dao": dao(distance, radii[near], dimensions[near], compat=True),
    }
