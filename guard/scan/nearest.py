"""Exact nearest neighbours among very many embeddings: blocks of products on a CPU or a GPU, in memory that is bounded.

`guard.screening.neighbours` answers few queries against a fixed bank, without torch; this answers very many against a
reference that may not fit into memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard._types import Floats, Rows

_BLOCK = 16_384
"""Rows of the reference that are compared at a time."""
_QUERIES = 1024
"""Queries that are compared at a time. Larger blocks fall out of the cache before they are searched."""
_CHUNK = 16
"""Products among which only the largest is looked at first."""
_CACHED = {"cpu": 2**17, "cuda": 2**26}
"""Numbers of gathered candidates that are measured at a time: as many as stay in a cache, or keep a GPU busy."""
_SPARE = 8
"""Candidates beyond k whose distance is measured: rounding may put the k-th behind the next."""


class Embeddings(Protocol):
    """A matrix of embeddings that is read in slices: an array, or one that lies on the disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number and length of the embeddings."""

    def __getitem__(self, rows: slice, /) -> Floats: ...


@dataclass(frozen=True)
class Found:
    """The nearest rows of a reference.

    Attributes:
        distances: Euclidean distances, nearest first, float32, shape [M, k].
        rows: Row numbers in the reference, int64, shape [M, k].
    """

    distances: Floats
    rows: Rows


class Reference:
    """Embeddings among which neighbours are searched.

    Distances are found in two steps. The product q·r − |r|²/2 orders the rows, and loses digits where rows nearly
    coincide. The k + 8 best rows are then measured as the norm of a difference, in float32: copies lie at distance 0,
    and a row is missed only for one whose squared distance differs by less than about 1e-6 times the squared norm.

    Of the products, only the largest of every 16 is looked at first: the k-th largest of these maxima is a bound that
    at least k products reach, and few more. So the search costs little beside the product.

    Args:
        parts: Matrices of one width, in order; rows are numbered through. They are read in slices, again for each call.
        device: Where products are computed.
    """

    def __init__(self, parts: Sequence[Embeddings], *, device: torch.device | None = None) -> None:
        self._parts = list(parts)
        self._device = device or torch.device("cpu")
        self.size = sum(part.shape[0] for part in self._parts)

    def search(self, queries: Floats, k: int, *, without: Rows | None = None) -> Found:
        """The k nearest rows to each query.

        Args:
            queries: Shape [M, D].
            k: Number of neighbours.
            without: Rows that are left out for each query, such as itself: shape [M, E].

        Raises:
            ValueError: The reference has too few rows for k.
        """
        spared = 0 if without is None else without.shape[1]
        if not 1 <= k <= self.size - spared:
            raise ValueError(f"k = {k} needs a reference of at least {k + spared} embeddings, it has {self.size}")
        wanted = min(k + spared + _SPARE, self.size)
        step = max(1, _QUERIES)
        asked = [
            torch.from_numpy(np.array(queries[s : s + step])).to(self._device) for s in range(0, len(queries), step)
        ]
        best = [_Best(query, wanted) for query in asked]
        start = 0
        for block in self._blocks():
            half = (block * block).sum(1) / 2
            for each in best:
                each.offer(block, half, start)
            start += len(block)
        parts = [each.measured() for each in best]
        distances, rows = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        if without is not None:
            left = (rows[:, :, None] == torch.from_numpy(without).to(self._device)[:, None, :]).any(2)
            distances = distances.masked_fill(left, torch.inf)
        distances, order = distances.sort(dim=1, stable=True)
        rows = rows.gather(1, order)
        return Found(distances[:, :k].cpu().numpy(), rows[:, :k].cpu().numpy())

    def _blocks(self) -> Iterator[Tensor]:
        for part in self._parts:
            for start in range(0, part.shape[0], _BLOCK):
                block = np.array(part[start : start + _BLOCK], np.float32)  # torch takes no mapped file
                yield torch.from_numpy(block).to(self._device)


class _Best:
    """The best candidates of a block of queries so far, with their vectors."""

    def __init__(self, queries: Tensor, count: int) -> None:
        self._queries, self._count = queries, count
        self._products = queries.new_full((len(queries), 0), 0.0)
        self._distances = queries.new_full((len(queries), 0), 0.0)
        self._rows = torch.zeros((len(queries), 0), dtype=torch.long, device=queries.device)

    def offer(self, block: Tensor, half: Tensor, start: int) -> None:
        """Compare with a block of the reference that begins at this row."""
        products = torch.addmm(-half[None, :], self._queries, block.T)
        full = self._products.shape[1] == self._count
        found = _largest(products, min(self._count, len(block)), self._products[:, -1:] if full else None)
        if found is None:
            return
        values, rows = found
        # Measured while the block is at hand: later it may have to be read again.
        new = _measured(self._queries, block, rows)
        both = torch.cat([self._products, values], 1)
        self._products, order = both.topk(min(self._count, both.shape[1]), 1)
        self._distances = torch.cat([self._distances, new], 1).gather(1, order)
        self._rows = torch.cat([self._rows, rows + start], 1).gather(1, order)

    def measured(self) -> tuple[Tensor, Tensor]:
        """Distances and rows of the candidates, in no order."""
        return self._distances, self._rows


def _largest(values: Tensor, count: int, floor: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """The largest numbers of each row and their columns, as `topk`, and several times faster on a CPU.

    Args:
        values: Shape [M, N].
        count: How many.
        floor: What numbers must exceed to be of interest, shape [M, 1]. Where fewer than `count` of a row do, its
            result is filled up with -inf.

    Returns:
        Numbers and columns, of no more than `count` columns; None if no number is of interest.
    """
    height, width = values.shape
    chunks = width // _CHUNK
    if values.is_cuda or chunks < count + 1:
        return values.topk(count, 1)
    numbers = values.numpy()
    maxima = values[:, : chunks * _CHUNK].view(height, _CHUNK, chunks).amax(1).numpy()
    bound = np.partition(maxima, chunks - count, axis=1)[:, chunks - count, None]
    reached = numbers >= bound
    if floor is not None:
        reached &= numbers > floor.numpy()
    hits = np.flatnonzero(reached)
    lines, columns = np.divmod(hits, width)
    counts = np.bincount(lines, minlength=height)
    if floor is not None and not len(hits):
        return None
    if counts.max() > 4 * count or (floor is None and counts.min() < count):  # ties, or numbers that are not finite
        return values.topk(count, 1)
    places = np.arange(len(hits)) - np.repeat(np.cumsum(counts) - counts, counts)
    best = np.full((height, int(counts.max())), -np.inf, np.float32)
    where = np.zeros(best.shape, np.int64)
    best[lines, places], where[lines, places] = numbers.reshape(-1)[hits], columns
    kept, order = torch.from_numpy(best).topk(min(count, best.shape[1]), 1)
    return kept, torch.from_numpy(where).gather(1, order)


def _measured(queries: Tensor, block: Tensor, rows: Tensor) -> Tensor:
    """Euclidean distances of queries, shape [M, D], to their candidates among the rows of a block, shape [M, C]."""
    count, width = rows.shape[1], block.shape[1]
    step = max(1, _CACHED["cuda" if block.is_cuda else "cpu"] // (count * width))
    squares = queries.new_empty(rows.shape)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        apart = block.index_select(0, part.flatten()).view(-1, count, width)
        apart -= queries[start : start + step, None]
        torch.sum(apart.square_(), 2, out=squares[start : start + step])
    return squares.sqrt_()


def smallest(values: Tensor, count: int, *, columns: bool) -> tuple[Floats, Rows | None]:
    """The smallest numbers of each row, in ascending order, and their columns, in any order; fast for short rows.

    Args:
        values: Shape [M, N].
        count: How many.
        columns: Whether their columns are wanted.

    Returns:
        Numbers and columns, shape [M, count]; None for columns that are not wanted.
    """
    if values.is_cuda:
        best, where = values.topk(count, 1, largest=False)
        return best.cpu().numpy(), where.cpu().numpy() if columns else None
    ordered: Floats = np.sort(values.numpy(), axis=1)[:, :count]
    if not columns:
        return ordered, None
    hits = np.flatnonzero(values.numpy() <= ordered[:, -1:])
    if len(hits) != count * len(values) or (hits[::count] // values.shape[1] != np.arange(len(values))).any():
        return ordered, values.topk(count, 1, largest=False).indices.numpy()  # ties
    return ordered, (hits % values.shape[1]).reshape(len(values), count)


def sampled(count: int, size: int, seed: int | tuple[int, ...]) -> NDArray[np.int64]:
    """Row numbers of a random sample without repetition, in ascending order."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(count, min(size, count), replace=False))
