"""Products with a bank, rows with the largest products, and distances: the parts of every search. numpy only."""

from collections.abc import Sequence

import numpy as np

from guard._types import Floats, Rows

ROUNDING = 4e-6
"""Largest rounding error of a float32 product of unit vectors; a bound for 1024 dimensions."""
_FEW = 4
"""Number of queries up to which one pass over the bank per query is quicker than a matrix product, which first repacks
the bank."""
_BLOCK_ROWS = 1024
"""Rows of the bank per matrix product, so few that the block and its repacked copy stay in the cache."""
_GROUPS = 4
"""Number of groups per row that is sought. More groups cost time, fewer let too many rows through."""
_MEASURED_ROWS = 4096
"""Number of rows that are measured at a time."""


def products(matrix: Floats, queries: Floats) -> Floats:
    """Inner products of the rows of a matrix with queries.

    A stack of dot products reads a row-major matrix at the speed of memory; OpenBLAS's matrix–vector product of such a
    matrix needs twice the time.

    Args:
        matrix: float32, shape [N, D]; it is not copied.
        queries: float32, shape [M, D].

    Returns:
        Shape [N, M].
    """
    found = np.empty((len(matrix), len(queries)), np.float32)
    if len(queries) <= _FEW:
        for column, query in enumerate(queries):
            found[:, column] = np.matmul(matrix[:, None, :], query[:, None])[:, 0, 0]
        return found
    for start in range(0, len(matrix), _BLOCK_ROWS):
        np.matmul(matrix[start : start + _BLOCK_ROWS], queries.T, out=found[start : start + _BLOCK_ROWS])
    return found


def largest(values: Floats, count: int, slack: Floats | float = 0.0) -> Sequence[Rows]:
    """The rows of the largest values of each column, and a few more.

    Rows are dealt into groups. The count-th largest of the groups' maxima is at most the count-th largest value, so all
    that is sought lies at or above it, and one comparison finds it. This costs a few passes over the values, where a
    partition of them costs as much as the product they come from.

    Args:
        values: One column of values for each query, shape [N, M].
        count: Number of values that are sought; ≤ N.
        slack: Distance below the bound within which rows are still taken; one number, or shape [M].

    Returns:
        For each column at least `count` row numbers, ascending.
    """
    size, columns = values.shape
    depth = max(1, size // (_GROUPS * count))
    groups = size // depth
    maxima = values[: groups * depth].reshape(depth, groups, columns).max(axis=0)
    bound = np.partition(maxima.T, groups - count, axis=1)[:, groups - count] - slack
    rows, column = np.divmod(np.flatnonzero(values >= bound), columns)
    if columns == 1:
        return [rows]
    # Sorting by column keeps rows ascending; 16 bits are sorted without comparisons.
    order = np.argsort(column.astype(np.uint16) if columns <= 2**16 else column, kind="stable")
    return np.split(rows[order], np.searchsorted(column[order], np.arange(1, columns)))


def squares(bank: Floats, query: Floats, rows: Rows) -> Floats:
    """Squared distances of one query, shape [D], to some rows of a bank, shape [N, D]."""
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _MEASURED_ROWS):
        part = slice(start, start + _MEASURED_ROWS)
        difference = bank.take(rows[part], axis=0)
        difference -= query
        found[part] = np.matmul(difference[:, None, :], difference[:, :, None])[:, 0, 0]
    return found
