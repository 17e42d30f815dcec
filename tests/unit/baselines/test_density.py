"""Scores against a slow reference that is written from the formulas, row by row."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from guard.baselines import DAO, LID, SLOF, DensityScore, KDistance
from guard.screening.neighbours import Nearest, Neighbours

Floats = NDArray[np.float32]
SCORES: tuple[type[DensityScore], ...] = (KDistance, SLOF, LID, DAO)


def unit(count: int, dimension: int = 12, *, seed: int = 0) -> Floats:
    values = np.random.default_rng(seed).normal(size=(count, dimension))
    normalised: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return normalised


def ordered(x: Floats, bank: Floats, leave_out: int | None = None) -> list[tuple[float, int]]:
    """All rows of a bank by their distance to x."""
    pairs = [(math.dist(x.tolist(), row.tolist()), index) for index, row in enumerate(bank)]
    return sorted(pair for pair in pairs if pair[1] != leave_out)


def dimension(distances: list[float]) -> float:
    return -len(distances) / sum(math.log(distance / distances[-1]) for distance in distances)


def expected(kind: type[DensityScore], k: int, x: Floats, bank: Floats, leave_out: int | None = None) -> float:
    near = ordered(x, bank, leave_out)[:k]
    radius = near[-1][0]
    if kind is KDistance:
        return radius
    if kind is LID:
        return dimension([distance for distance, _ in near])
    terms = []
    for _, index in near:
        around = [distance for distance, _ in ordered(bank[index], bank, index)[:k]]
        ratio = radius / around[-1]
        terms.append(ratio if kind is SLOF else dimension(around) * math.log(ratio))
    return sum(terms) / k


def as_released(kind: type[DensityScore], k: int, batch: Floats, row: int) -> float:
    """What the released detectors give for one row of a batch, quirks included."""
    others = ordered(batch[row], batch, row)
    radius = others[k][0]
    if kind is KDistance:
        return radius
    if kind is LID:
        return -k / sum(math.log(distance / radius + 1e-4) for distance, _ in others[:k])
    terms = []
    for _, found in others[:k]:
        index = found - 1 if found > row else found
        around = [distance for distance, _ in ordered(batch[index], batch)]
        ratio = radius / around[k]
        near = -k / sum(math.log(distance / around[k] + 1e-4) for distance in around[:k])
        terms.append(ratio if kind is SLOF else near * math.log(ratio))
    return sum(terms) / k


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("k", [2, 5, 39])
def test_scores_are_what_the_formulas_say(kind: type[DensityScore], k: int) -> None:
    bank, asked = unit(40), unit(15, seed=1)
    found = kind(k).fit(bank).score_samples(asked)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected(kind, k, x, bank) for x in asked], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SCORES)
def test_scores_within_the_bank_leave_each_row_out(kind: type[DensityScore]) -> None:
    bank = unit(40)
    slow = [expected(kind, 5, x, bank, row) for row, x in enumerate(bank)]
    np.testing.assert_allclose(kind(5).fit(bank).within(), slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("length", [1.0, 9.0])
def test_compat_gives_what_the_released_code_gives(kind: type[DensityScore], length: float) -> None:
    batch = unit(40) * np.random.default_rng(1).uniform(1, length, (40, 1)).astype(np.float32)
    slow = [as_released(kind, 6, batch, row) for row in range(40)]
    np.testing.assert_allclose(kind(6, compat=True).fit(batch).within(), slow, rtol=1e-5, atol=1e-5)


# Points 0, 1, 2, 4, 8 on a line. Their second distances are 2, 1, 2, 3, 6, their third ones 4, 3, 2, 4, 7; the rows
# that are looked up are 0 1, 0 1, 1 0, 2 1, 3 2. For the first two points one of these is the point itself.
@pytest.mark.parametrize(
    ("kind", "scores"),
    [(KDistance, [4, 3, 2, 4, 7]), (SLOF, [3, 9 / 4, 3 / 2, 3, (7 / 3 + 7 / 2) / 2])],
)
def test_compat_on_five_points_worked_out_by_hand(kind: type[DensityScore], scores: list[float]) -> None:
    line = np.array([[0], [1], [2], [4], [8]], np.float32)
    np.testing.assert_allclose(kind(2, compat=True).fit(line).within(), scores, rtol=1e-6)


@pytest.mark.parametrize("kind", [SLOF, DAO])
def test_compat_turns_what_is_undefined_into_1000(kind: type[DensityScore]) -> None:
    batch = np.concatenate([np.repeat(unit(1), 8, axis=0), unit(3, seed=1)])
    found = kind(3, compat=True).fit(batch).within()
    np.testing.assert_array_equal(found[:8], 1000)


def test_the_k_distance_is_that_of_scikit_learn() -> None:
    bank, asked = unit(200), unit(30, seed=1)
    distances, _ = NearestNeighbors(n_neighbors=16).fit(bank.astype(np.float64)).kneighbors(asked)
    np.testing.assert_allclose(KDistance().fit(bank).score_samples(asked), distances[:, -1], rtol=1e-5)


@pytest.mark.parametrize("kind", SCORES)
def test_larger_is_more_suspicious(kind: type[DensityScore]) -> None:
    generator = np.random.default_rng(0)
    plane = np.zeros((330, 12), np.float32)
    plane[:, 0], plane[:, 1:4] = 1, 0.1 * generator.normal(size=(330, 3))
    far = plane[300:] + 0.3 * generator.normal(size=(30, 12)).astype(np.float32)
    bank, usual, strange = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (plane[:300], plane[300:], far))
    fitted = kind(20).fit(bank)
    assert np.median(fitted.score_samples(strange)) > fitted.score_samples(usual).max()


def test_one_search_serves_all_scores() -> None:
    bank, asked = unit(100), unit(20, seed=1)
    neighbours = Neighbours(bank)
    nearest, within = neighbours.search(asked, 9), neighbours.within(9)
    for kind in SCORES:
        shared = kind(5).fit(neighbours, within=within)
        own = kind(5).fit(bank)
        np.testing.assert_array_equal(shared.score(nearest), own.score_samples(asked))
        np.testing.assert_array_equal(shared.score(within), own.within())


@given(st.sampled_from(SCORES), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_neither_the_order_of_the_bank_nor_a_rotation_matters(kind: type[DensityScore], seed: int) -> None:
    bank, asked = unit(50, 6, seed=seed), unit(8, 6, seed=seed + 1)
    generator = np.random.default_rng(seed)
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0].astype(np.float32)
    found = kind(7).fit(bank).score_samples(asked)
    shuffled = kind(7).fit(generator.permutation(bank)).score_samples(asked)
    np.testing.assert_allclose(shuffled, found, rtol=1e-5, atol=1e-6)
    turned = kind(7).fit(bank @ rotation).score_samples(asked @ rotation)
    np.testing.assert_allclose(turned, found, rtol=1e-3, atol=1e-4)


@given(st.sampled_from(SCORES), st.integers(1, 12), st.integers(1, 12), st.integers(2, 10))
@settings(max_examples=60)
def test_copies_give_finite_scores_without_a_warning(kind: type[DensityScore], first: int, second: int, k: int) -> None:
    two = unit(2)
    bank = np.concatenate([np.repeat(two, [first, second], axis=0), unit(11, seed=3)])
    fitted = kind(k).fit(bank)
    assert np.isfinite(fitted.score_samples(np.concatenate([bank, unit(4, seed=4)]))).all()
    assert np.isfinite(fitted.within()).all()


def test_a_copy_of_a_point_that_occurs_often_is_not_suspicious() -> None:
    bank = np.concatenate([np.repeat(unit(1), 10, axis=0), unit(30, seed=1)])
    copy = unit(1)
    assert KDistance(5).fit(bank).score_samples(copy)[0] == 0
    assert SLOF(5).fit(bank).score_samples(copy)[0] == 1
    assert DAO(5).fit(bank).score_samples(copy)[0] == 0
    assert LID(5).fit(bank).score_samples(copy)[0] == pytest.approx(0.072, abs=1e-3)


def test_the_dimension_of_neighbours_at_one_distance_is_bounded() -> None:
    bank = np.eye(12, dtype=np.float32)[1:]
    assert LID(8).fit(bank).score_samples(np.eye(12, dtype=np.float32)[:1])[0] == pytest.approx(1e4)


@pytest.mark.parametrize("use", [lambda score: score.within(), lambda score: score.score_samples(unit(1))])
def test_a_score_without_a_bank_says_so(use: Callable[[DensityScore], Floats]) -> None:
    with pytest.raises(ValueError, match="SLOF has no bank yet; call fit first"):
        use(SLOF(3))


@pytest.mark.parametrize(("kind", "k"), [(KDistance, 0), (SLOF, 0), (LID, 1), (DAO, 1)])
def test_a_k_that_is_too_small_is_refused(kind: type[DensityScore], k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} is too small, {kind.__name__} needs at least"):
        kind(k)


@pytest.mark.parametrize(("kind", "k"), [(KDistance, 6), (LID, 6), (SLOF, 5), (DAO, 5)])
def test_a_bank_that_is_too_small_is_refused(kind: type[DensityScore], k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} "):
        kind(k).fit(unit(5))
    kind(k - 1).fit(unit(5))


def test_too_few_neighbours_are_refused() -> None:
    bank = unit(20)
    neighbours = Neighbours(bank)
    with pytest.raises(ValueError, match="5 neighbours are needed, there are 4"):
        KDistance(5).fit(bank).score(neighbours.search(unit(1), 4))
    with pytest.raises(ValueError, match="5 neighbours are needed, there are 4"):
        SLOF(5).fit(bank, within=neighbours.within(4))


def test_what_is_known_of_another_bank_is_refused() -> None:
    other: Nearest = Neighbours(unit(21)).within(5)
    with pytest.raises(ValueError, match="neighbours of 21 rows are not those of a bank of 20"):
        SLOF(5).fit(unit(20), within=other)


@pytest.mark.parametrize("value", [math.nan, 0.0])
@pytest.mark.parametrize("kind", SCORES)
def test_a_bank_without_directions_is_refused(kind: type[DensityScore], value: float) -> None:
    bank = unit(30)
    bank[2] = value
    with pytest.raises(ValueError, match="must be"):
        kind(3).fit(bank)


def test_embeddings_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared with a bank of 12"):
        KDistance(3).fit(unit(30)).score_samples(unit(2, 13))
