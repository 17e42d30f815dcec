import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from guard.errors import UsageError
from guard.screening import approximate, quantised
from guard.screening import neighbours as module
from guard.screening.neighbours import Neighbours, SearchMethod
from guard.screening.products import largest, products

Floats = NDArray[np.float32]
METHODS: tuple[SearchMethod, ...] = ("exact", "approximate")


def unit(count: int, dimension: int = 24, *, seed: int = 0) -> Floats:
    values = np.random.default_rng(seed).normal(size=(count, dimension))
    normalised: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return normalised


def steep(count: int, dimension: int = 64, *, seed: int = 0) -> Floats:
    """Unit vectors with a spectrum that falls like that of an image tower."""
    values = np.random.default_rng(seed).normal(size=(count, dimension)) / np.arange(1, dimension + 1)
    values[:, 0] += 2
    normalised: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return normalised


@pytest.fixture(params=[0, sys.maxsize], ids=["quantised", "in full"])
def least_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Both ways in which the exact search goes about it, on banks that are small enough for a test."""
    monkeypatch.setattr(module, "_QUANTISED_BYTES", request.param)
    least: int = request.param
    return least


def quantised_and_in_full(bank: Floats, monkeypatch: pytest.MonkeyPatch) -> tuple[Neighbours, Neighbours]:
    found = []
    for least in (0, sys.maxsize):
        monkeypatch.setattr(module, "_QUANTISED_BYTES", least)
        found.append(Neighbours(bank))
    assert isinstance(found[0]._finder, quantised.Quantised)
    return found[0], found[1]


@pytest.mark.usefixtures("least_bytes")
@pytest.mark.parametrize("k", [1, 2, 7, 64, 700])
@pytest.mark.parametrize("count", [1, 5, 50])
def test_the_exact_search_finds_what_scikit_learn_finds(k: int, count: int) -> None:
    bank, asked = unit(700), unit(count, seed=1)
    expected, rows = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.astype(np.float64)).kneighbors(asked)
    found = Neighbours(bank).search(asked, k)
    assert found.distances.dtype == np.float32
    assert found.indices.dtype == np.int64
    np.testing.assert_allclose(found.distances, expected, rtol=1e-5)
    # Two rows may change places where rounding makes their distances equal.
    assert (found.indices == rows).mean() > 0.999


@pytest.mark.parametrize("k", [1, 5, 99])
def test_within_leaves_a_row_itself_out(k: int) -> None:
    bank = unit(100)
    expected, rows = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.astype(np.float64)).kneighbors()
    found = Neighbours(bank).within(k)
    np.testing.assert_array_equal(found.indices, rows)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-5)


@pytest.mark.usefixtures("least_bytes")
def test_copies_lie_at_exactly_0_and_come_in_the_order_of_the_bank() -> None:
    few = unit(40, 512)
    bank = np.concatenate([few, few, few])
    found = Neighbours(bank).search(few, 3)
    np.testing.assert_array_equal(found.distances, 0)
    np.testing.assert_array_equal(found.indices, np.arange(40)[:, None] + [0, 40, 80])


@pytest.mark.parametrize("k", [1, 3, 9])
def test_within_a_bank_of_copies_all_distances_are_0_and_no_row_finds_itself(k: int) -> None:
    bank = np.repeat(unit(1), 10, axis=0)
    found = Neighbours(bank).within(k)
    np.testing.assert_array_equal(found.distances, 0)
    assert not (found.indices == np.arange(10)[:, None]).any()
    assert all(len(set(row)) == k for row in found.indices.tolist())


@pytest.mark.usefixtures("least_bytes")
def test_what_a_query_finds_does_not_depend_on_the_batch_it_comes_in() -> None:
    searcher, asked = Neighbours(steep(3000)), steep(40, seed=1)
    together = searcher.search(asked, 16)
    for row in range(0, 40, 7):
        alone = searcher.search(asked[row : row + 1], 16)
        np.testing.assert_array_equal(alone.distances[0], together.distances[row])
        np.testing.assert_array_equal(alone.indices[0], together.indices[row])


def test_what_is_found_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, asked = unit(100), unit(23, seed=1)
    whole = Neighbours(bank).search(asked, 3)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * len(bank) * 5)
    monkeypatch.setattr(module, "_CHECKED_ROWS", 2)
    parts = Neighbours(bank).search(asked, 3)
    np.testing.assert_array_equal(parts.distances, whole.distances)
    np.testing.assert_array_equal(parts.indices, whole.indices)


@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=50)
def test_the_order_of_the_bank_does_not_matter(size: int, seed: int, data: st.DataObject) -> None:
    bank, asked = unit(size, 5, seed=seed), unit(6, 5, seed=seed + 1)
    k = data.draw(st.integers(1, size))
    order = np.random.default_rng(seed).permutation(size)
    found, moved = Neighbours(bank).search(asked, k), Neighbours(bank[order]).search(asked, k)
    np.testing.assert_array_equal(moved.distances, found.distances)
    np.testing.assert_array_equal(order[moved.indices], found.indices)


def test_a_rotation_of_the_space_does_not_matter() -> None:
    bank, asked = unit(300), unit(20, seed=1)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(24, 24)))[0].astype(np.float32)
    found, turned = Neighbours(bank).search(asked, 9), Neighbours(bank @ rotation).search(asked @ rotation, 9)
    np.testing.assert_allclose(turned.distances, found.distances, rtol=1e-5)


def test_vectors_of_any_length_are_compared_by_distance_and_not_by_angle() -> None:
    generator = np.random.default_rng(0)
    bank, asked = (unit(n, seed=n) * generator.uniform(1, 50, (n, 1)).astype(np.float32) for n in (300, 20))
    expected, rows = NearestNeighbors(n_neighbors=9, algorithm="brute").fit(bank.astype(np.float64)).kneighbors(asked)
    found = Neighbours(bank, unit=False).search(asked, 9)
    np.testing.assert_array_equal(found.indices, rows)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-5)


def test_the_approximate_search_finds_nearly_what_the_exact_one_does() -> None:
    bank, asked = steep(4000), steep(300, seed=1)
    exact, found = Neighbours(bank).search(asked, 16), Neighbours(bank, method="approximate").search(asked, 16)
    same = exact.indices == found.indices
    assert same.all(axis=1).mean() > 0.98
    np.testing.assert_array_equal(found.distances[same], exact.distances[same])
    assert (found.distances >= exact.distances).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_search_finds_as_many_as_there_are(method: SearchMethod) -> None:
    bank = unit(9, 3)
    found = Neighbours(bank, method=method).search(unit(5, 3, seed=1), 9)
    np.testing.assert_array_equal(np.sort(found.indices, axis=1), np.broadcast_to(np.arange(9), (5, 9)))


def test_without_faiss_the_approximate_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match=r'pip install "clip-guard\[ann\]"'):
        Neighbours(unit(5), method="approximate")


@pytest.mark.usefixtures("least_bytes")
def test_a_mapped_bank_stays_mapped(tmp_path: Path) -> None:
    bank, asked = steep(500), steep(3, seed=1)
    bank.tofile(tmp_path / "bank")
    mapped = np.memmap(tmp_path / "bank", np.float32, "r", shape=bank.shape)
    searcher = Neighbours(mapped)
    # Nothing that a caller sees tells a copy from a map, except the memory it takes.
    assert np.shares_memory(searcher._banks[0], mapped)
    np.testing.assert_array_equal(searcher.search(asked, 4).distances, Neighbours(bank).search(asked, 4).distances)


def test_no_queries_find_nothing() -> None:
    found = Neighbours(unit(3)).search(np.empty((0, 24), np.float32), 2)
    assert found.distances.shape == found.indices.shape == (0, 2)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} needs a bank of at least"):
        Neighbours(unit(5)).search(unit(1), k)


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_that_is_not_among_the_others_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} among the others"):
        Neighbours(unit(5)).within(k)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bank_that_is_not_normalised_is_refused(value: float) -> None:
    bank = unit(5)
    bank[3] *= value
    with pytest.raises(ValueError, match="L2-normalised"):
        Neighbours(bank)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_bank_that_is_not_finite_is_refused(value: float, *, normalised: bool) -> None:
    bank = unit(5)
    bank[3] = value
    with pytest.raises(ValueError, match="finite"):
        Neighbours(bank, unit=normalised)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 24), (3, 0)])
def test_a_bank_that_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a bank is a matrix"):
        Neighbours(np.ones(shape, np.float32))


@pytest.mark.parametrize("shape", [(24,), (2, 23), (1, 2, 24)])
def test_queries_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be compared with a bank of 24"):
        Neighbours(unit(5)).search(np.ones(shape, np.float32), 1)


def test_a_query_that_is_not_finite_is_refused() -> None:
    asked = unit(2)
    asked[1, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        Neighbours(unit(5)).search(asked, 1)


# Values on a coarse grid, so that ties are the rule.
@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=100)
def test_no_row_among_the_largest_is_left_out(size: int, columns: int, seed: int, data: st.DataObject) -> None:
    values = np.random.default_rng(seed).integers(0, 30, (size, columns)).astype(np.float32)
    count = data.draw(st.integers(1, size))
    for column, rows in enumerate(largest(values, count)):
        bound = np.sort(values[:, column])[-count]
        assert set(np.flatnonzero(values[:, column] >= bound)) <= set(rows.tolist())
        assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize("count", [1, 4, 5, 40])
def test_products_are_inner_products(count: int) -> None:
    bank, asked = unit(1500), unit(count, seed=1)
    np.testing.assert_allclose(products(bank, asked), bank.astype(np.float64) @ asked.T, atol=1e-6)


def test_a_bank_that_the_approximate_search_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_SEARCH_EFFORT", 32)
    with pytest.raises(UsageError, match="search it with the exact method"):
        Neighbours(unit(3000, 512), method="approximate")


@pytest.mark.usefixtures("least_bytes")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_banks_that_are_asked_together_give_what_each_gives_by_itself(method: SearchMethod, count: int) -> None:
    banks, asked = [steep(1000, seed=seed) for seed in range(3)], steep(40, seed=7)[:count]
    together = Neighbours(*banks, method=method).distances(asked, 9)
    assert together.shape == (3, count)
    for bank, found in zip(banks, together, strict=True):
        np.testing.assert_array_equal(found, Neighbours(bank, method=method).search(asked, 9).distances[:, -1])


def test_banks_of_several_shapes_cannot_be_asked_together() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Neighbours(unit(5), unit(6))


def test_rows_that_were_not_picked_at_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the bank lies within the codes' rounding of the query's 16th neighbour.
    bank = unit(1, 512, seed=1) + 1e-4 * unit(2000, 512)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    bank[::2] = unit(1000, 512, seed=2)
    fast, slow = quantised_and_in_full(bank, monkeypatch)
    asked = bank[1:2] + 1e-3 * unit(9, 512, seed=3)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    for some in (asked[:1], asked):
        np.testing.assert_array_equal(fast.search(some, 16).indices, slow.search(some, 16).indices)


BANKS = st.sampled_from(["flat", "steep", "clustered", "lopsided", "with copies", "sparse", "on a grid"])


def made(kind: str, count: int, dimension: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, dimension))
    if kind == "steep":
        values /= np.arange(1, dimension + 1)
    if kind == "clustered":
        values = values[:1] + 1e-4 * values
    if kind == "lopsided":
        values = values[:1] + 0.05 * values
        values[::7] *= -1
    if kind == "with copies":
        values[count // 2 :] = values[: count - count // 2]
    if kind == "sparse":
        values *= generator.random((count, dimension)) < 0.05
        values[:, 0] += 1e-3
    if kind == "on a grid":
        values = np.rint(values) + (np.arange(dimension) == 0) * 0.5
    found: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return found


@given(BANKS, BANKS, st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=150)
def test_8_bit_products_leave_out_none_of_the_nearest(
    kind: str, queries: str, size: int, dimension: int, seed: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fast, slow = quantised_and_in_full(made(kind, size, dimension, seed), monkeypatch)
    k = data.draw(st.integers(1, size))
    length = data.draw(st.sampled_from([0.0, 1e-6, 1.0, 30.0]))
    count = data.draw(st.sampled_from([1, 7]))
    asked = made(queries, count, dimension, seed + 1) * np.float32(length)
    expected, found = slow.search(asked, k), fast.search(asked, k)
    np.testing.assert_array_equal(found.distances, expected.distances)
    np.testing.assert_array_equal(found.indices, expected.indices)


@pytest.mark.parametrize("code", [125, -125, 124.5, 31_749.5])
def test_a_query_between_two_codes_is_not_misread(code: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = np.full((1, 512), code / 31_750, np.float32)
    asked[0, 0] = 1
    asked /= np.linalg.norm(asked)
    bank = 0.1 * unit(200, 512) + np.linspace(-1, 1, 200)[:, None].astype(np.float32) / np.float32(512**0.5)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    fast, slow = quantised_and_in_full(bank, monkeypatch)
    for query in (asked, -asked):
        np.testing.assert_array_equal(fast.search(query, 20).indices, slow.search(query, 20).indices)


def test_a_bank_that_lies_close_together_leaves_few_rows_to_a_query_far_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    middle, asked = unit(1, 512, seed=1), unit(5, 512, seed=2)
    bank = middle + 0.05 * unit(5000, 512)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    finder = quantised_and_in_full(bank, monkeypatch)[0]._finder
    assert max(len(rows) for ((_, rows),) in finder.near(asked, 16)) < 100


def test_8_bit_products_leave_few_rows_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = unit(5000, 512)
    finder = quantised_and_in_full(bank, monkeypatch)[0]._finder
    left = [len(rows) for ((_, rows),) in finder.near(unit(20, 512, seed=1), 16)]
    assert max(left) < 100


def test_a_bank_in_several_graphs_is_searched_like_one_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, asked = unit(700), unit(23, seed=1)
    monkeypatch.setattr(module, "_QUANTISED_BYTES", 0)
    whole = Neighbours(bank).search(asked, 9)
    monkeypatch.setattr(quantised, "_GRAPH_BYTES", 300 * 24)
    monkeypatch.setattr(quantised, "_BLOCK_BYTES", 8 * 700 * 5)
    monkeypatch.setattr(quantised, "_CODED_ROWS", 64)
    parts = Neighbours(bank).search(asked, 9)
    np.testing.assert_array_equal(parts.distances, whole.distances)
    np.testing.assert_array_equal(parts.indices, whole.indices)


class Saturating:
    """Products as x86 makes them without VNNI: those of neighbours are added in 16 bits, which may not hold them."""

    bits = 16

    def __init__(self, codes: NDArray[np.int8], scales: Floats) -> None:
        self.codes, self.scales = codes.astype(np.int32), scales

    def products(self, queries: Floats) -> Floats:
        found = np.zeros((len(queries), *self.codes.shape[:2]))
        for worth in (1 / 127, 1 / (127 * 250)):
            codes = np.rint(queries / worth)
            queries = queries - (codes * worth).astype(np.float32)
            each = (codes.astype(np.int32) + 128)[:, None, None] * self.codes
            limit = 2 ** (self.bits - 1)
            pairs = (each[..., ::2] + each[..., 1::2]).clip(-limit, limit - 1)
            found += (pairs.sum(-1) - 128 * self.codes.sum(-1)) * self.scales * worth
        return found.astype(np.float32)

    def largest(self, queries: Floats, count: int) -> tuple[Floats, NDArray[np.int64]]:
        products = self.products(queries)
        rows = np.argsort(-products, axis=2)[:, :, :count]
        return np.take_along_axis(products, rows, 2), rows


@pytest.mark.parametrize(("bits", "top"), [(32, 127), (16, 63), (12, 0)])
def test_a_machine_that_multiplies_codes_wrongly_is_noticed_and_gets_ones_that_it_can_multiply(
    bits: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, asked = unit(300, 64), unit(9, 64, seed=1)
    expected = Neighbours(bank).search(asked, 5)
    monkeypatch.setattr(Saturating, "bits", bits)
    monkeypatch.setattr(quantised, "_Graph", Saturating)
    monkeypatch.setattr(module, "_QUANTISED_BYTES", 0)
    quantised.largest_code.cache_clear()
    try:
        assert quantised.largest_code() == top
        searcher = Neighbours(bank)
    finally:
        quantised.largest_code.cache_clear()
    assert isinstance(searcher._finder, quantised.Quantised) is bool(top)
    found = searcher.search(asked, 5)
    np.testing.assert_array_equal(found.distances, expected.distances)
    np.testing.assert_array_equal(found.indices, expected.indices)
