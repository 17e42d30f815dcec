"""Exact search that reads a quarter of the bytes: products of 8-bit codes bound which rows can be nearest."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats, Rows
from guard.screening.products import ROUNDING, largest, squares

Codes = NDArray[np.int8]

_ZERO = 128
"""Code that stands for 0 in a query."""
_TOPS = (127, 63)
"""Largest codes of a bank, which are signed: of 8 bits, or of 7 bits where 8 would not be multiplied exactly."""
_HIGH, _LOW = 127, 250
"""A query has two codes for each number; the unit of the lower code is 1 / 250 of the unit of the higher one. Both
share one pass over the bank, and only the rounding of the bank is left in the bound. Half a unit of the higher code is
125 of the lower, which fits."""
_REST = 0.5001 / (_HIGH * _LOW)
"""Largest error of both codes together, for a query whose numbers are at most 1."""
_SPARE, _MORE = 8, 16
"""A graph picks eight times as many rows as are sought, plus 16."""
_AT_ONCE = 1.15
"""How far below the k-th largest product rows are measured, in units of the error bound (`reaches`). How far is needed
is known once they are measured: one bound below the product of the k-th nearest row, of which the codes are wrong by a
tenth of a bound."""
_FEW = 4
"""Number of queries up to which the graphs pick the largest products; for more queries this takes longer than the
products."""
_ROUNDINGS = 8
"""Number of products, or terms as large, whose rounding errors add up in a bound."""
_GRAPH_BYTES = 2**26
"""Bytes of codes in one graph; its file is limited to 2 GiB, and is in memory twice while it is read."""
_BLOCK_BYTES = 2**22
"""Bytes of products that are computed before they are used; more of them do not stay in the cache."""
_CODED_ROWS = 4096


class _Near(NamedTuple):
    """The rows of a bank that are measured first for one query.

    Attributes:
        rows: Row numbers; at least k.
        beyond: Bound of the products of all other rows.
        products: Products of all rows, shape [N], if they are known.
    """

    rows: Rows
    beyond: np.float32
    products: Floats | None


class Quantised:
    """Finds the nearest rows of some banks by products of 8-bit codes, and measures their distances.

    Rows b are ranked by their product with the query q; subtracting the mean m of their bank does not change the order.
    A row without the mean is s·c plus a rest of length r, where c is a vector of integers up to 127 or 63. A query is
    coded by integers up to 31,750, so that its own rest is negligible. Products of integers are exact, so that the
    products of rows are known up to an error of r·|q|. The rows with the largest products are measured. With the k-th
    smallest distance d among them, a row that is nearer has a product of at least (|b|² + |q|² − d²) / 2 − m·q, and the
    product of its codes is smaller by at most r·|q|. All rows that reach this and were not measured yet are measured
    then. Without the mean, the rests of a bank whose rows are close together are short, so that as few of its rows are
    measured as of a bank that is spread out.

    ONNX Runtime codes the queries, multiplies them with all banks and, for a few queries, picks the largest products,
    all in one call and on one thread, as each decision runs on one thread. All products are looked at only where the
    bound reaches below those that were picked.

    Args:
        banks: Unit vectors, all of one shape [N, D]. Their codes take a quarter of their memory.
        lengths: The exact lengths of the vectors, shape [N] for each bank.
        top: The largest code; see `largest_code`.
    """

    def __init__(self, banks: Sequence[Floats], lengths: Sequence[Floats], top: int) -> None:
        self._banks = banks
        self._size, dimension = banks[0].shape
        coded = [_coded(bank, top) for bank in banks]
        step = max(1, _GRAPH_BYTES // (len(banks) * dimension))
        self._starts = range(0, self._size, step)
        self._graphs = [
            _Graph(
                np.stack([each.codes[start : start + step] for each in coded]),
                np.stack([each.scales[start : start + step] for each in coded]),
            )
            for start in self._starts
        ]
        self._means = np.array([each.mean for each in coded])
        self._halves = np.array([exact.min() ** 2 / 2 for exact in lengths], np.float32)
        self._rests = np.array([each.rest for each in coded], np.float32)
        of_query = [each.furthest * _REST * dimension**0.5 for each in coded]
        self._slacks = np.array(of_query, np.float32)

    def near(self, queries: Floats, k: int) -> Iterator[list[tuple[Floats, Rows]]]:
        """For each query and each bank squared distances and row numbers, the k nearest rows among them."""
        step = max(1, _BLOCK_BYTES // (8 * len(self._banks) * self._size))
        for start in range(0, len(queries), step):
            yield from self._block(queries[start : start + step], k)

    def _block(self, queries: Floats, k: int) -> Iterator[list[tuple[Floats, Rows]]]:
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        # Codes reach up to 1. The largest products of a longer query are those of a shorter one.
        factors = np.maximum(lengths, 1)
        coded = queries / factors
        reaches = np.minimum(lengths, 1) * self._rests + self._slacks + _ROUNDINGS * ROUNDING * factors
        levels = (self._halves + lengths**2 / 2) / factors - coded @ self._means.T - reaches
        select = self._picked if len(queries) <= _FEW else self._sifted
        for number, each in enumerate(select(coded, k, _AT_ONCE * reaches)):
            found = []
            for bank, near in enumerate(each):
                rows, vectors = near.rows, self._banks[bank]
                measured = squares(vectors, queries[number], rows)
                last = np.partition(measured, k - 1)[k - 1]
                needed = levels[number, bank] - last / (2 * factors[number, 0])
                if near.beyond >= needed:
                    products = near.products
                    if products is None:
                        products = self._products(coded[number : number + 1])[0, bank]
                    rows = np.flatnonzero(products >= needed)
                    measured = squares(vectors, queries[number], rows)
                found.append((measured, rows))
            yield found

    def _picked(self, queries: Floats, k: int, depths: Floats) -> Iterator[list[_Near]]:
        """Choose rows by the largest products that the graphs pick, which is quicker for a few queries."""
        values, rows, others = self._largest(queries, k)
        counts = (values >= (values[:, :, k - 1] - depths)[:, :, None]).sum(axis=2)
        for each in zip(rows, values, counts, others, strict=True):
            yield [
                _Near(near[:count], products[count] if count < len(products) else rest, None)
                for near, products, count, rest in zip(*each, strict=True)
            ]

    def _sifted(self, queries: Floats, k: int, depths: Floats) -> Iterator[list[_Near]]:
        """Choose rows by all products, which is quicker for many queries."""
        for products, depth in zip(self._products(queries), depths, strict=True):
            each = []
            for values, below in zip(products, depth, strict=True):
                near = largest(values[:, None], k, below)[0]
                each.append(_Near(near, values[near].min(), values))
            yield each

    def _largest(self, queries: Floats, k: int) -> tuple[Floats, Rows, Floats]:
        """For each query and bank the largest products in descending order, their rows, and a bound of all others."""
        count = _SPARE * k + _MORE
        picks = [graph.largest(queries, count) for graph in self._graphs]
        if len(picks) == 1:
            values, rows = picks[0]
            others = values[:, :, -1] if count < self._size else np.full(values.shape[:2], -np.inf, np.float32)
            return values, rows, others
        others = np.max([values[:, :, -1] for values, _ in picks], axis=0)
        values = np.concatenate([values for values, _ in picks], axis=2)
        rows = np.concatenate([rows + start for (_, rows), start in zip(picks, self._starts, strict=True)], axis=2)
        order = np.argsort(-values, axis=2)
        return np.take_along_axis(values, order, 2), np.take_along_axis(rows, order, 2), others

    def _products(self, queries: Floats) -> Floats:
        """All products, shape [M, banks, N]."""
        return np.concatenate([graph.products(queries) for graph in self._graphs], axis=2)


class _Graph:
    """Computes products of queries with the same range of rows of each bank, by ONNX Runtime.

    Args:
        codes: Codes of the rows, shape [banks, n, D].
        scales: The number that code 1 of each row stands for, shape [banks, n].
    """

    def __init__(self, codes: Codes, scales: Floats) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        banks, self._size, dimension = codes.shape
        constants: dict[str, NDArray[np.generic]] = {
            "bank": np.ascontiguousarray(codes.reshape(-1, dimension).T),
            "scales": scales.ravel(),
            "zero": np.array(_ZERO, np.uint8),
            "unit": np.array(1 / _HIGH, np.float32),
            "lower unit": np.array(1 / (_HIGH * _LOW), np.float32),
            "lower share": np.array(1 / _LOW, np.float32),
            "shape": np.array([-1, banks, self._size]),
        }
        node = helper.make_node
        nodes = [
            node("QuantizeLinear", ["queries", "unit", "zero"], ["high"]),
            node("DequantizeLinear", ["high", "unit", "zero"], ["coarse"]),
            node("Sub", ["queries", "coarse"], ["fine"]),
            node("QuantizeLinear", ["fine", "lower unit", "zero"], ["low"]),
            node("Concat", ["high", "low"], ["codes"], axis=0),
            # Sums stay integers until they are multiplied by the scales; numpy would need another pass for that.
            node("MatMulIntegerToFloat", ["codes", "bank", "unit", "scales", "zero"], ["both"], domain="com.microsoft"),
            node("Split", ["both"], ["of high", "of low"], axis=0, num_outputs=2),
            node("Mul", ["of low", "lower share"], ["small"]),
            node("Add", ["of high", "small"], ["sum"]),
            node("Reshape", ["sum", "shape"], ["products"]),
            node("TopK", ["products", "count"], ["values", "rows"], axis=2),
        ]
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes,
            "products",
            [value("queries", TensorProto.FLOAT, ["batch", dimension]), value("count", TensorProto.INT64, [1])],
            [
                value("products", TensorProto.FLOAT, ["batch", banks, self._size]),
                value("values", TensorProto.FLOAT, ["batch", banks, None]),
                value("rows", TensorProto.INT64, ["batch", banks, None]),
            ],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # Quantisation is meant as arithmetic here; ONNX Runtime must not take it for a quantised network.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        # ONNX Runtime keeps the model for providers that fail, which is a second copy of the codes.
        self._session._model_bytes = None  # noqa: SLF001 - there is no public way

    def largest(self, queries: Floats, count: int) -> tuple[Floats, Rows]:
        """For each query and bank the largest products, in descending order, and their rows.

        Args:
            queries: Numbers between −1 and 1, shape [M, D].
            count: Number of products; all products, if there are fewer.

        Returns:
            Two arrays of shape [M, banks, count].
        """
        feed = {"queries": queries, "count": np.array([min(count, self._size)])}
        values, rows = self._session.run(["values", "rows"], feed)
        return values, rows

    def products(self, queries: Floats) -> Floats:
        """All products, shape [M, banks, n]."""
        found: Floats = self._session.run(["products"], {"queries": queries, "count": np.array([1])})[0]
        return found


@cache
def largest_code() -> int:
    """The largest code with which products are exact on this machine; 0 if there is none.

    x86 without VNNI adds pairs of products in 16 bits, which are enough for 7-bit codes and not for 8-bit codes.
    """
    return next((top for top in _TOPS if _is_exact(top)), 0)


def _is_exact(top: int) -> bool:
    codes = np.full((1, 64, 64), top, np.int8)
    codes[:, 1::2] *= -1
    graph = _Graph(codes, np.ones((1, 64), np.float32))
    expected = codes.sum(axis=2, dtype=np.float32)
    return all(np.allclose(graph.products(np.ones((count, 64), np.float32)), expected) for count in (1, 8))


class _Coded(NamedTuple):
    """The codes of a bank from which its mean was subtracted.

    Attributes:
        mean: Mean of the rows, shape [D].
        codes: Codes of the rows, shape [N, D].
        scales: The number that code 1 of each row stands for, shape [N].
        rest: Largest length of the difference between a row and what its codes stand for.
        furthest: Largest length of what the codes of a row stand for; up to 2, for a row opposite to the mean.
    """

    mean: Floats
    codes: Codes
    scales: Floats
    rest: float
    furthest: float


def _coded(bank: Floats, top: int) -> _Coded:
    codes, scales = np.empty(bank.shape, np.int8), np.empty(len(bank), np.float32)
    mean = bank.mean(axis=0, dtype=np.float64).astype(np.float32)
    longest = furthest = 0.0
    for start in range(0, len(bank), _CODED_ROWS):
        part = slice(start, start + _CODED_ROWS)
        centred = bank[part] - mean
        reach = np.abs(centred).max(axis=1)
        scales[part] = np.where(reach > 0, reach / np.float32(top), np.float32(1))
        codes[part] = np.rint(centred / scales[part, None])
        rests = np.linalg.norm(centred - codes[part] * scales[part, None], axis=1)
        longest = max(longest, float(rests.max()))
        furthest = max(furthest, float((np.linalg.norm(centred, axis=1) + rests).max()))
    return _Coded(mean, codes, scales, longest, furthest)
