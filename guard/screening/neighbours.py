"""Nearest neighbours in a fixed bank."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from guard.errors import UsageError
from guard.screening.products import ROUNDING, largest, products, squares
from guard.screening.quantised import Quantised, largest_code

Embeddings = NDArray[np.float32]
SearchMethod = Literal["exact", "approximate"]
"""How nearest neighbours are searched: without a miss, or in an index that misses one now and then."""

_BLOCK_BYTES = 64 * 2**20
"""Largest intermediate matrix of products."""
_CHECKED_ROWS = 4096
"""Rows of a bank that are checked at a time."""
_NORM_TOLERANCE = 1e-3
_PROBES, _PROBED_NEIGHBOUR, _LEAST_RECALL = 512, 16, 0.99
"""A method other than the exact one must find the 16th neighbour of 99 % of 512 rows. A decision depends on the
neighbour only near the threshold, so that fewer than one decision in a thousand differs."""
_QUANTISED_BYTES = 2**18
"""Size of a bank from which products of 8-bit codes save time: 128 × 512 numbers."""


@dataclass(frozen=True)
class Nearest:
    """The nearest rows of a bank, nearest first; rows at the same distance by their number.

    Attributes:
        distances: Euclidean distances, float32, shape [M, k].
        indices: Row numbers in the bank, int64, shape [M, k].
    """

    distances: NDArray[np.float32]
    indices: NDArray[np.int64]


Measured = Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]]
"""For each bank squared distances to some rows, and which they are."""


class Finder(Protocol):
    """Finds the rows of banks that may be nearest, and measures their distances."""

    def near(self, queries: Embeddings, k: int) -> Iterator[Measured]:
        """Squared distances to at least k distinct rows of each bank, for each query."""


class Neighbours:
    """Nearest neighbours in one bank of unit vectors, or in several banks that are searched together.

    Every method proposes candidates by a cheap product, and then measures their distance as the norm of a difference:
    2 − 2·cos loses all digits where vectors coincide. A distance therefore does not depend on the method, nor on which
    queries come in one batch; a copy of a bank row lies at distance 0.

    Args:
        banks: float32 arrays in row order, all of one shape [N, D], L2-normalised. They are not copied: a memory-mapped
            bank stays mapped, and no bank may be changed.
        method: `exact` misses no neighbour. It reads a copy of the bank with 8 bits per number first, unless the bank
            is tiny or the machine does not multiply such numbers exactly; then it reads the bank itself. `approximate`
            uses an index of the faiss library, which has such a copy too, does not read all of it, and misses a
            neighbour now and then; with a flat spectrum, as whitening makes it, nearly always
            (docs/decisions/0006-neighbours.md).
        unit: Whether vectors must have length 1; if not, the exact method takes any finite vectors.

    Raises:
        ValueError: A bank is not a finite matrix of unit vectors, or they differ in shape.
        UsageError: The method misses too many neighbours of the bank's own rows, because its spectrum is too flat.
        MissingDependencyError: The approximate search needs faiss, which is not installed.
    """

    def __init__(self, *banks: Embeddings, method: SearchMethod = "exact", unit: bool = True) -> None:
        for bank in banks:
            if bank.ndim != 2 or not bank.size:
                raise ValueError(f"a bank is a matrix of embeddings, not an array of shape {bank.shape}")
        if len({bank.shape for bank in banks}) != 1:
            raise ValueError("banks that are asked together must have one shape")
        if not unit and method != "exact":
            raise ValueError(f"the {method} search takes unit vectors only")
        self._banks = [np.ascontiguousarray(bank, dtype=np.float32) for bank in banks]
        lengths = [_checked_lengths(bank, unit=unit) for bank in self._banks]
        self._finder: Finder
        if method == "approximate":
            from guard.screening.approximate import Approximate

            self._finder = _Each(self._banks, map(Approximate, self._banks))
            self._check_recall(method, _Each(self._banks, map(_Exact, self._banks, lengths)))
            return
        top = largest_code() if unit and self._banks[0].nbytes >= _QUANTISED_BYTES else 0
        if top:
            self._finder = Quantised(self._banks, lengths, top)
        else:
            self._finder = _Each(self._banks, map(_Exact, self._banks, lengths))

    def _check_recall(self, method: SearchMethod, exact: Finder) -> None:
        """Refuse a method that would lead to other decisions, which it does not notice by itself."""
        k = min(_PROBED_NEIGHBOUR + 1, self.size)
        proposed = self._finder
        for number, bank in enumerate(self._banks):
            probes = bank[np.linspace(0, len(bank) - 1, min(_PROBES, len(bank))).astype(int)]
            found = self.distances(probes, k)[number]
            self._finder = exact
            right = float(np.mean(found == self.distances(probes, k)[number]))
            self._finder = proposed
            if right < _LEAST_RECALL:
                raise UsageError(
                    f"the {method} search finds the right {k - 1}th neighbour of only {right:.0%} of this bank's rows; "
                    "search it with the exact method"
                )

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self._banks[0].shape[1])

    @property
    def size(self) -> int:
        """Number of embeddings in a bank."""
        return len(self._banks[0])

    def search(self, queries: Embeddings, k: int) -> Nearest:
        """The k nearest rows of the first bank to each query.

        Args:
            queries: float32, shape [M, D]. The caller must give unit vectors: scores of other vectors mean nothing.
            k: Number of neighbours; 1 ≤ k ≤ size.

        Raises:
            ValueError: k is out of range, or queries are not finite vectors of the bank's length.
        """
        queries = self._checked(queries, k)
        distances = np.empty((len(queries), k), np.float32)
        indices = np.empty((len(queries), k), np.int64)
        for row, ((measured, rows), *_) in enumerate(self._finder.near(queries, k)):
            order = np.lexsort((rows, measured))[:k]
            indices[row] = rows[order]
            np.sqrt(measured[order], out=distances[row])
        return Nearest(distances, indices)

    def distances(self, queries: Embeddings, k: int) -> NDArray[np.float32]:
        """The distance of each query to the k-th nearest of each bank, shape [banks, M].

        Args:
            queries: As for `search`.
            k: As for `search`.

        Raises:
            ValueError: As of `search`.
        """
        queries = self._checked(queries, k)
        found = np.empty((len(self._banks), len(queries)), np.float32)
        for row, near in enumerate(self._finder.near(queries, k)):
            found[:, row] = [np.partition(measured, k - 1)[k - 1] for measured, _ in near]
        return np.sqrt(found, out=found)

    def within(self, k: int) -> Nearest:
        """The k nearest rows of the first bank to each of its rows, not counting the row itself.

        This costs a product of the bank with itself, in blocks; for 50,000 rows of
        512 numbers half a minute of one core.

        Raises:
            ValueError: k is smaller than 1 or larger than size − 1.
        """
        if not 1 <= k < self.size:
            raise ValueError(f"k = {k} among the others needs a bank of at least {max(k, 1) + 1}, it has {self.size}")
        found = self.search(self._banks[0], k + 1)
        # A row finds itself, unless more than k copies of it come first: then the last of these is left out.
        itself = found.indices == np.arange(self.size)[:, None]
        itself[~itself.any(axis=1), -1] = True
        others = (self.size, k)
        return Nearest(found.distances[~itself].reshape(others), found.indices[~itself].reshape(others))

    def _checked(self, queries: Embeddings, k: int) -> Embeddings:
        if not 1 <= k <= self.size:
            raise ValueError(f"k = {k} needs a bank of at least {max(k, 1)} embeddings, it has {self.size}")
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(f"queries of shape {queries.shape} cannot be compared with a bank of {self.dimension}")
        if not np.isfinite(queries).all():
            raise ValueError("a query is not finite")
        return np.ascontiguousarray(queries, dtype=np.float32)


class _Proposer(Protocol):
    def candidates(self, queries: Embeddings, k: int) -> Sequence[NDArray[np.int64]]:
        """For each query at least k distinct rows of one bank."""


class _Each:
    """Measures the rows that a proposer names, for each bank separately.

    Args:
        banks: The banks, shape [N, D] each.
        proposers: One proposer for each bank.
    """

    def __init__(self, banks: Sequence[Embeddings], proposers: Iterable[_Proposer]) -> None:
        self._pairs = list(zip(banks, proposers, strict=True))

    def near(self, queries: Embeddings, k: int) -> Iterator[Measured]:
        step = max(1, _BLOCK_BYTES // (4 * len(self._pairs[0][0])))
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            proposed = [proposer.candidates(block, k) for _, proposer in self._pairs]
            for query, each in zip(block, zip(*proposed, strict=True), strict=True):
                yield [(squares(bank, query, rows), rows) for (bank, _), rows in zip(self._pairs, each, strict=True)]


class _Exact:
    """Proposes every row that is among the k nearest but for rounding errors.

    The nearest row maximises b·q − |b|²/2, whatever the lengths.
    """

    def __init__(self, bank: Embeddings, lengths: NDArray[np.float32]) -> None:
        self._bank = bank
        self._halves = (lengths**2 / 2)[:, None]
        self._rounding = ROUNDING * float(lengths.max())

    def candidates(self, queries: Embeddings, k: int) -> Sequence[NDArray[np.int64]]:
        closeness = products(self._bank, queries)
        closeness -= self._halves
        # Half a square of the bank's lengths and a product with the query have rounding errors alike.
        slack = self._rounding * (self._rounding / ROUNDING + np.linalg.norm(queries, axis=1)).astype(np.float32)
        return largest(closeness, k, slack)


def _checked_lengths(bank: Embeddings, *, unit: bool) -> NDArray[np.float32]:
    """The lengths of a bank's rows, computed in blocks, so that a mapped bank is read and not copied."""
    lengths = np.empty(len(bank), np.float32)
    with np.errstate(over="ignore"):  # refused below
        for start in range(0, len(bank), _CHECKED_ROWS):
            lengths[start : start + _CHECKED_ROWS] = np.linalg.norm(bank[start : start + _CHECKED_ROWS], axis=1)
    if not np.isfinite(lengths).all():
        raise ValueError("the embeddings of a bank must be finite")
    if unit and np.abs(lengths - 1).max() > _NORM_TOLERANCE:
        raise ValueError("the embeddings of a bank must be L2-normalised")
    return lengths
