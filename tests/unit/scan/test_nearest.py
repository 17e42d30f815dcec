"""Blocked search against the plain one, and the scores against those of the baselines."""

import numpy as np
import pytest

from guard.baselines import DAO, LID, SLOF, KDistance
from guard.scan.nearest import Reference, _largest, sampled, smallest
from guard.scan.scores import Sampled, released
from guard.scan.vectors import Unit, gathered

RNG = np.random.default_rng(0)


def embeddings(count: int, width: int = 24) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return RNG.standard_normal((count, width)).astype(np.float32)


def test_blocks_chunks_and_parts_lose_no_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.scan.nearest._BLOCK", 3000)
    monkeypatch.setattr("guard.scan.nearest._QUERIES", 64)
    bank, queries = embeddings(7001), embeddings(130)
    bank[4000:4020] = bank[17]  # copies, at the same distance
    queries[3] = bank[17]
    found = Reference([bank[:1], bank[1:5000], bank[5000:]]).search(queries, 24)
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - bank[None], axis=2)
    np.testing.assert_allclose(found.distances, np.sort(distances, 1)[:, :24], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(distances, found.rows, 1), found.distances, rtol=1e-5, atol=1e-6)
    assert (found.distances[3, :21] == 0).all()


def test_near_copies_keep_their_digits() -> None:
    bank = 100 + embeddings(2000)
    bank[5] = bank[4] + np.float32(2**-12)
    found = Reference([bank]).search(bank[4:5], 1, without=np.array([[4]]))
    assert found.rows[0, 0] == 5
    assert found.distances[0, 0] == pytest.approx(np.linalg.norm(bank[4].astype(np.float64) - bank[5]), rel=1e-5)


def test_a_row_that_is_left_out_is_no_neighbour() -> None:
    bank = embeddings(100)
    rows = Reference([bank]).search(bank, 99, without=np.arange(100)[:, None]).rows
    assert (np.sort(rows, 1) == [[j for j in range(100) if j != i] for i in range(100)]).all()
    with pytest.raises(ValueError, match="needs a reference of at least 101"):
        Reference([bank]).search(bank, 100, without=np.arange(100)[:, None])


def test_the_largest_of_ties_are_as_many_as_asked() -> None:
    import torch

    values = torch.zeros(2, 4001)
    values[1, 7] = 1
    found = _largest(values, 5)
    assert found is not None
    best, columns = found
    assert best.tolist() == [[0.0] * 5, [1.0] + [0.0] * 4]
    assert columns[1, 0] == 7
    assert all(len(set(row)) == 5 for row in columns.tolist())


@pytest.mark.parametrize(("name", "score"), [("k-distance", KDistance), ("slof", SLOF), ("lid", LID), ("dao", DAO)])
def test_released_scores_are_those_of_the_baselines(name: str, score: type[KDistance]) -> None:
    batch = embeddings(90)
    expected = score(8, compat=True).fit(batch).within()
    np.testing.assert_allclose(released(batch, None, 8)[name], expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "score"), [("k-distance", KDistance), ("slof", SLOF), ("lid", LID), ("dao", DAO)])
def test_scores_against_a_sample_are_those_of_the_baselines(name: str, score: type[KDistance]) -> None:
    import torch

    unit = Unit(embeddings(200))[:]
    rows = sampled(200, 60, (3, 0))
    expected = score(8).fit(unit[rows]).score_samples(np.delete(unit, rows, 0))
    found = Sampled([unit[:50], unit[50:]], 60, 1, 8, seed=3, device=torch.device("cpu")).scores(unit, 0)[name]
    np.testing.assert_allclose(np.delete(found, rows), expected, rtol=2e-5, atol=1e-5)
    within = score(8).fit(unit[rows]).within()
    np.testing.assert_allclose(found[rows], within, rtol=2e-5, atol=1e-5)


def test_copies_of_an_image_are_at_distance_zero_of_it() -> None:
    import torch

    bank = 100 + embeddings(200)
    bank[50:150] = bank[0]
    rows = Sampled([bank], 100, 2, 4, seed=3, device=torch.device("cpu")).scores(bank, 0, ("k-distance",))
    assert (rows["k-distance"][50:150] == 0).all()
    assert (np.delete(rows["k-distance"], [0, *range(50, 150)]) > 1).all()


def test_the_smallest_of_ties_are_as_many_as_asked() -> None:
    import torch

    values = torch.tensor([[3.0, 1, 1, 1, 0], [5, 4, 3, 2, 1]])
    best, columns = smallest(values, 3, columns=True)
    assert best.tolist() == [[0, 1, 1], [1, 2, 3]]
    assert columns is not None
    assert sorted(columns[1].tolist()) == [2, 3, 4]
    assert len(set(columns[0].tolist())) == 3
    assert 0 not in columns[0]


def test_rows_are_gathered_from_parts() -> None:
    bank = embeddings(50)
    rows = np.array([0, 9, 10, 11, 49])
    assert (gathered([bank[:10], bank[10:11], bank[11:]], rows) == bank[rows]).all()
