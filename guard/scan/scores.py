"""How suspicious a pair is, from the neighbours of its image among other images of the set; larger is more suspicious.

The scores are those of Huang et al. (ICLR 2025; `guard.baselines.density` has their formulas): how thinly a reference
is populated around an image. They fail where the reference holds k images with the trigger, which are then each other's
neighbours. The reference of the released code is the batch that an image is loaded in, with its captions; `Sampled`
takes small random samples of all images instead, and averages over several.

As in the released code, embeddings are taken as the tower gives them and not normalised: in a model that was trained on
the poisoned set, an image with the trigger is often longer than any other (docs/methods.md has figures).
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard._types import Floats, Rows
from guard.baselines.density import dao, dimension, released_dimension, slof
from guard.errors import DataError
from guard.scan.nearest import Embeddings, Found, Reference, sampled, smallest
from guard.scan.vectors import gathered

Scores = dict[str, NDArray[np.float64]]
ALL = ("k-distance", "slof", "lid", "dao")
_OF_NEIGHBOURS = frozenset(("slof", "dao"))
"""Scores that need to know how far the neighbours' own neighbours lie."""
_BLOCK = 512
"""Images that are compared with all samples at a time."""
_CLOSE = 1e-3
"""Squared distances below this part of the squared length are measured again, as norms of differences: the product has
lost their digits."""


class Sampled:
    """Random samples of all images as the reference. All are compared with in one product.

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
        self._rows = [sampled(count, size, (seed, draw)) for draw in range(draws)]
        banks = [gathered(parts, rows) for rows in self._rows]
        itself = np.arange(len(banks[0]))[:, None]
        within = [Reference([bank], device=device).search(bank, k, without=itself).distances for bank in banks]
        self._radii = np.concatenate([distances[:, -1] for distances in within])
        self._dimensions = np.concatenate([dimension(distances) for distances in within])
        self._bank = torch.from_numpy(np.concatenate(banks)).to(device)
        self._squares = self._bank.square().sum(1)

    def scores(self, queries: Floats, start: int, names: Collection[str] = ALL) -> Scores:
        """Some scores of consecutive images, the first of which has this number in the set."""
        blocks = [
            self._block(queries[first : first + _BLOCK], start + first, names)
            for first in range(0, len(queries), _BLOCK)
        ]
        return {name: np.concatenate([block[name] for block in blocks]) for name in names}

    def _block(self, queries: Floats, start: int, names: Collection[str]) -> Scores:
        size = len(self._rows[0])
        places = [np.searchsorted(rows, (start, start + len(queries))) for rows in self._rows]
        itself = (
            np.concatenate([rows[slice(*place)] - start for rows, place in zip(self._rows, places, strict=True)]),
            np.concatenate([np.arange(*place) + draw * size for draw, place in enumerate(places)]),
        )
        squares = self._distances(torch.from_numpy(queries).to(self._bank.device), itself)
        nearest, near = smallest(squares.view(-1, size), self._k, columns=not _OF_NEIGHBOURS.isdisjoint(names))
        if near is not None:
            near += np.tile(np.arange(len(self._rows)) * size, len(queries))[:, None]
        found = density(np.sqrt(nearest), near, self._radii, self._dimensions, names)
        return {name: values.reshape(len(queries), -1).mean(1) for name, values in found.items()}

    def _distances(self, queries: Tensor, itself: tuple[Rows, Rows]) -> Tensor:
        """Squared distances of images to all rows of all samples; an image is not its own neighbour."""
        own = queries.square().sum(1)[:, None]
        squares = torch.addmm(self._squares, queries, self._bank.T, alpha=-2).add_(own)
        squares[itself] = torch.inf
        close = torch.nonzero(squares.amin(1) < _CLOSE * own[:, 0]).flatten().tolist()
        for row in close:
            squares[row] = (self._bank - queries[row]).square_().sum(1)
        squares[itself] = torch.inf
        return squares


def density(
    distances: Floats,
    near: Rows | None,
    radii: NDArray[np.floating],
    dimensions: NDArray[np.float64],
    names: Collection[str] = ALL,
) -> Scores:
    """The published scores by their formulas.

    Args:
        distances: Distances of each image to its neighbours, nearest first, shape [M, k].
        near: Rows of these in the reference, in any order; None where only k-distance and LID are asked for.
        radii: d_k of every row of the reference.
        dimensions: LID of every row of the reference.
        names: Which scores.
    """
    distance, found = distances[:, -1], Scores()
    if "k-distance" in names:
        found["k-distance"] = distance.astype(np.float64)
    if "lid" in names:
        found["lid"] = dimension(distances)
    if near is not None and "slof" in names:
        found["slof"] = slof(distance, radii[near])
    if near is not None and "dao" in names:
        found["dao"] = dao(distance, radii[near], dimensions[near])
    return found


def batch(
    image: Floats, text: Floats | None, k: int, names: Collection[str] = ALL, *, device: torch.device | None = None
) -> Scores:
    """Scores of one batch by their formulas: the reference is its images and, with `text`, its captions.

    Arguments and errors are those of `released`.
    """
    found, within = _neighbours(image, text, k, names, device)
    if within is None:
        return density(found.distances, None, np.empty(0), np.empty(0), names)
    return density(found.distances, found.rows, within[:, -1], dimension(within), names)


def released(
    image: Floats, text: Floats | None, k: int, names: Collection[str] = ALL, *, device: torch.device | None = None
) -> Scores:
    """The scores of one batch as the released code computes them, by image; see `guard.baselines.density`.

    The reference is the batch itself: its images and, with `text`, its captions, an image's own excepted.

    Args:
        image: Embeddings as the tower gives them, shape [B, D].
        text: Those of the captions; None for images alone.
        k: Number of neighbours.
        names: Which scores.
        device: Where neighbours are searched.

    Raises:
        ValueError: The batch is too small for k.
    """
    found, within = _neighbours(image, text, k + 1, names, device)
    distance, scores = found.distances[:, k], Scores()
    if "k-distance" in names:
        scores["k-distance"] = distance.astype(np.float64)
    if "lid" in names:
        scores["lid"] = released_dimension(found.distances[:, :k], found.distances[:, k:])
    if within is None:
        return scores
    size = len(image)
    own = np.arange(size)[:, None]
    radii = within[:, k - 1]
    # Its positions are those after the row's own image and caption were cut out, used to look up in the whole.
    near = found.rows[:, :k]
    near = near - (near > own) - (near > own + size)
    if "slof" in names:
        scores["slof"] = slof(distance, radii[near], compat=True)
    if "dao" in names:
        itself = np.zeros((len(within), 1), np.float32)
        dimensions = released_dimension(np.hstack([itself, within[:, : k - 1]]), radii[:, None])
        scores["dao"] = dao(distance, radii[near], dimensions[near], compat=True)
    return scores


def _neighbours(
    image: Floats, text: Floats | None, k: int, names: Collection[str], device: torch.device | None
) -> tuple[Found, Floats | None]:
    """The k nearest of each image in its batch; and the distances of every row, where a score needs them."""
    size = len(image)
    bank = image if text is None else np.concatenate([image, text])
    reference, own = Reference([bank], device=device), np.arange(size)[:, None]
    if _OF_NEIGHBOURS.isdisjoint(names):
        return reference.search(image, k, without=own if text is None else np.hstack([own, own + size])), None
    # One search for both: an image's own caption is struck out of its neighbours afterwards.
    every = reference.search(bank, k if text is None else k + 1, without=np.arange(len(bank))[:, None])
    order = np.argsort(every.rows[:size] == own + size, axis=1, kind="stable")[:, :k]
    distances: Floats = np.take_along_axis(every.distances[:size], order, 1)
    rows: Rows = np.take_along_axis(every.rows[:size], order, 1)
    return Found(distances, rows), every.distances
