"""Exact search that reads a quarter of the bytes: products of 8-bit codes bound which rows can be nearest."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from guard.screening.products import ROUNDING, largest

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

_ZERO = 128
"""Code of 0 in a query."""
_TOPS = (127, 63)
"""Largest codes of a bank, which are signed: 8 bits, or 7 where more of them would not be multiplied exactly."""
_LOW = 256
"""A query has two codes, of which the higher counts so much more: it shares the pass over the bank, and leaves only the
bank's own rounding in the bound."""
_HIGHEST = 127 * _LOW
_SESSION_BYTES = 2**26
"""Codes in one graph; a graph's file is limited to 2 GiB, and held twice while it is read."""
_BLOCK_BYTES = 2**22
"""Products that are made before they are looked at; more of them leave the cache."""
_CODED_ROWS = 4096


class Quantised:
    """Everything that could be among the k nearest, as 8-bit products tell it.

    Rows are ranked by their product with the query q, so also without the mean of the bank. What is left of a row is
    s·c plus a rest of length r, with c of integers up to 127 or 63. A query has integers up to 32,512, so that its own
    rest is hardly there. The products of integers are exact, so that those of rows are known within r·|q|. Where the
    k-th largest lower bound lies above the upper bound of a row, that row is none of the k nearest; the others are
    measured. Without the mean, a bank that lies close together has short rests: as many rows are left of it as of one
    that is spread out. Of 10,000 random vectors of 512 numbers 50 are left for k = 16.

    The products are ONNX Runtime's, on one thread, as a decision is.

    Args:
        bank: Unit vectors, shape [N, D]. Its codes take a quarter of its memory.
        lengths: What their lengths are exactly, shape [N].
        top: The largest code; see `largest_code`.
    """

    def __init__(self, bank: Floats, lengths: Floats, top: int) -> None:
        self._size, self._dimension = bank.shape
        scales, self._rests = np.empty((2, self._size), np.float32)
        codes = np.empty(bank.shape, np.int8)
        mean = bank.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._furthest = np.float32(0)
        for start in range(0, self._size, _CODED_ROWS):
            rows = slice(start, start + _CODED_ROWS)
            centred = bank[rows] - mean
            codes[rows], scales[rows], self._rests[rows] = _coded(centred, top)
            # What the codes stand for is no longer than a row with its rest; up to 2, opposite to the mean.
            self._furthest = max(self._furthest, (np.linalg.norm(centred, axis=1) + self._rests[rows]).max())
        self._longest = self._rests.max()
        # Rows are ranked by b·q, where the distance has b·q − |b|²/2: unit vectors differ in length by little.
        self._slack = ROUNDING + float(np.ptp(lengths**2 / 2))
        step = max(1, _SESSION_BYTES // self._dimension)
        parts = (slice(start, start + step) for start in range(0, self._size, step))
        self._products = [_Products(codes[rows], scales[rows]) for rows in parts]

    def candidates(self, queries: Floats, k: int) -> Sequence[NDArray[np.int64]]:
        """For each query at least k distinct rows, ascending: none of the k nearest is left out."""
        found: list[NDArray[np.int64]] = []
        step = max(1, _BLOCK_BYTES // (8 * self._size))
        for start in range(0, len(queries), step):
            found += self._block(queries[start : start + step], k)
        return found

    def _block(self, queries: Floats, k: int) -> list[NDArray[np.int64]]:
        reach = np.abs(queries).max(axis=1, initial=0)
        units = np.where(reach > 0, reach / _HIGHEST, 1).astype(np.float32)
        whole = np.rint(queries / units[:, None])
        high = np.floor((whole + _LOW // 2) / _LOW)
        codes = (np.concatenate([high, whole - _LOW * high]) + _ZERO).astype(np.uint8)
        # From here on in units of the queries' codes.
        products = [multiply(codes) for multiply in self._products]
        closeness = products[0] if len(products) == 1 else np.concatenate(products, axis=1)
        low = closeness[len(queries) :]
        closeness = closeness[: len(queries)]
        closeness *= _LOW
        closeness += low
        lengths = np.linalg.norm(queries, axis=1)
        rests = np.linalg.norm(queries - whole * units[:, None], axis=1)
        reaches = (lengths / units).astype(np.float32)
        slacks = ((self._slack * np.maximum(lengths, 1) + self._furthest * rests) / units).astype(np.float32)
        return [self._selected(*each, k) for each in zip(closeness, reaches, slacks, strict=True)]

    def _selected(self, closeness: Floats, reach: np.float32, slack: np.float32, k: int) -> NDArray[np.int64]:
        """Rows whose upper bound reaches the k-th largest lower bound."""
        # As if all rests were the longest: a few rows are left, for which it is looked at more closely.
        rows = largest(closeness[:, None], k, 2 * (self._longest * reach + slack))[0]
        near, rests = closeness[rows], self._rests[rows] * reach + slack
        bound = np.partition(near - rests, len(rows) - k)[len(rows) - k]
        kept: NDArray[np.int64] = rows[near + rests >= bound]
        return kept


class _Products:
    """Products of the codes of queries with a part of a bank.

    Args:
        codes: Shape [n, D].
        scales: What a unit of each row's codes is worth, shape [n].
    """

    def __init__(self, codes: NDArray[np.int8], scales: Floats) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        operands: dict[str, NDArray[np.generic]] = {
            "codes": np.ascontiguousarray(codes.T),
            "one": np.array(1, np.float32),
            "scales": scales,
            "zero": np.array(_ZERO, np.uint8),
        }
        count, dimension = codes.shape
        # Integers until they are multiplied by the scales; numpy would need a pass of its own for that.
        node = helper.make_node("MatMulIntegerToFloat", ["queries", *operands], ["products"], domain="com.microsoft")
        graph = helper.make_graph(
            [node],
            "products",
            [helper.make_tensor_value_info("queries", TensorProto.UINT8, ["batch", dimension])],
            [helper.make_tensor_value_info("products", TensorProto.FLOAT, ["batch", count])],
            [numpy_helper.from_array(array, name) for name, array in operands.items()],
        )
        versions = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        # Kept by ONNX Runtime for providers that fail: a second copy of the codes.
        self._session._model_bytes = None  # noqa: SLF001 - as said

    def __call__(self, queries: Codes) -> Floats:
        """Shape [M, n], of queries with `_ZERO` at 0, shape [M, D]."""
        products: Floats = self._session.run(None, {"queries": queries})[0]
        return products


@cache
def largest_code() -> int:
    """The largest code of a bank whose products are exact on this machine; 0 if there is none.

    x86 without VNNI adds pairs of products in 16 bits, where those of 8-bit codes do not fit, and of 7-bit ones do.
    """
    return next((top for top in _TOPS if _is_exact(top)), 0)


def _is_exact(top: int) -> bool:
    codes = np.full((64, 64), top, np.int8)
    codes[1::2] *= -1
    multiply = _Products(codes, np.ones(64, np.float32))
    for count in (1, 2, 16):
        queries = np.full((count, 64), 255, np.uint8)
        if (multiply(queries) != (queries.astype(np.float32) - _ZERO) @ codes.T.astype(np.float32)).any():
            return False
    return True


def _coded(rows: Floats, top: int) -> tuple[NDArray[np.int8], Floats, Floats]:
    """Codes, what a unit of them is worth, and the length of what they leave."""
    reach = np.abs(rows).max(axis=1)
    scales = np.where(reach > 0, reach / np.float32(top), np.float32(1))
    codes = np.rint(rows / scales[:, None]).astype(np.int8)
    return codes, scales, np.linalg.norm(rows - codes * scales[:, None], axis=1)
