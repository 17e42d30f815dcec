"""Approximate search in a graph of neighbours, by faiss, for banks too large to be read for each request."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.errors import MissingDependencyError

_LINKS = 32
_BUILD_EFFORT = 100
_SEARCH_EFFORT = 256
"""Number of candidates that a search keeps; when 64 rows are sought among 50,000, it then finds 99.8 % of them."""


def import_faiss() -> Any:  # noqa: ANN401 - its type information is incomplete
    """The library faiss.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return import_module("faiss")
    except ImportError:
        raise MissingDependencyError(
            'approximate search needs faiss, which is not installed; pip install "clip-guard[ann]"'
        ) from None


class Approximate:
    """Proposes candidates by a hierarchical navigable small-world graph (Malkov & Yashunin, 2018), 8 bits per number.

    The graph is built on one thread, so that the same bank gives the same graph.

    Args:
        bank: Unit vectors, float32, shape [N, D].

    Raises:
        MissingDependencyError: faiss is not installed.
    """

    def __init__(self, bank: NDArray[np.float32]) -> None:
        faiss = import_faiss()
        self._size, dimension = bank.shape
        self._parameters = faiss.SearchParametersHNSW
        self._index = faiss.IndexHNSWSQ(dimension, faiss.ScalarQuantizer.QT_8bit, _LINKS)
        self._index.hnsw.efConstruction = _BUILD_EFFORT
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            self._index.train(bank)
            self._index.add(bank)
        finally:
            faiss.omp_set_num_threads(threads)

    def candidates(self, queries: NDArray[np.float32], k: int) -> Sequence[NDArray[np.int64]]:
        """For each query 2 k + 32 row numbers, because 8 bits per number cannot tell the nearest rows apart."""
        count = 2 * k + 32
        everything = np.arange(self._size)
        if 2 * count >= self._size:
            return [everything] * len(queries)
        parameters = self._parameters(efSearch=max(_SEARCH_EFFORT, 2 * count))
        _, found = self._index.search(queries, count, params=parameters)
        # faiss fills rows with −1 where it finds too few candidates.
        rows = [np.sort(row[row >= 0]) for row in found]
        return [row if len(row) >= k else everything for row in rows]
