import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from guard.errors import RequestError, UsageError
from guard.screening import MAX_K, Neighbours, Screen, default_k, neighbours, threshold

Floats = NDArray[np.float32]


def unit(count: int, dimension: int = 24, *, seed: int = 0, around: Floats | None = None) -> Floats:
    values = np.random.default_rng(seed).normal(size=(count, dimension))
    if around is not None:
        values = around + 0.2 * values / math.sqrt(dimension)
    normalised: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return normalised


@pytest.mark.parametrize("k", [1, 2, 7, 200])
def test_distances_equal_those_of_scikit_learn(k: int) -> None:
    bank, asked = unit(200), unit(50, seed=1)
    expected, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.astype(np.float64)).kneighbors(asked)
    found = Neighbours(bank, k).kth_distance(asked)
    assert found.dtype == np.float32
    assert found.shape == (50,)
    np.testing.assert_allclose(found, expected[:, -1], atol=1e-5)


def test_distances_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, asked = unit(100), unit(23, seed=1)
    whole = Neighbours(bank, 3).kth_distance(asked)
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 4 * len(bank) * 5)
    np.testing.assert_allclose(Neighbours(bank, 3).kth_distance(asked), whole, atol=1e-6)


def test_the_order_of_the_bank_does_not_matter() -> None:
    bank, asked = unit(100), unit(20, seed=1)
    order = np.random.default_rng(2).permutation(len(bank))
    np.testing.assert_allclose(
        Neighbours(bank[order], 4).kth_distance(asked), Neighbours(bank, 4).kth_distance(asked), atol=1e-6
    )


def test_distances_lie_between_0_and_2_at_the_extremes() -> None:
    bank = unit(1)
    same, opposite = Neighbours(bank, 1).kth_distance(np.concatenate([bank, -bank]))
    assert 0 <= same < 1e-3
    assert opposite == pytest.approx(2)


def test_no_embeddings_have_no_distances() -> None:
    assert Neighbours(unit(3), 1).kth_distance(np.empty((0, 24), np.float32)).shape == (0,)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} "):
        Neighbours(unit(5), k)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_a_bank_that_is_not_normalised_is_refused(value: float) -> None:
    bank = unit(5)
    bank[3] *= value
    with pytest.raises(ValueError, match="L2-normalised"):
        Neighbours(bank, 1)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 24)])
def test_a_bank_that_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a bank is a matrix"):
        Neighbours(np.ones(shape, np.float32), 1)


# Scores on a coarse grid, so that ties are the rule; alpha in thousandths, as people write it.
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 999))
@settings(max_examples=300)
def test_a_score_is_flagged_exactly_if_its_conformal_p_value_is_at_most_alpha(clean: list[int], alpha: int) -> None:
    exact = Fraction(alpha, 1000)
    if exact * (len(clean) + 1) < 1:
        with pytest.raises(UsageError):
            threshold(np.array(clean, np.float32), alpha / 1000)
        return
    chosen = threshold(np.array(clean, np.float32), alpha / 1000)
    assert (chosen.alpha, chosen.size) == (alpha / 1000, len(clean))
    for doubled in range(-1, 27):
        score = doubled / 2
        p_value = Fraction(1 + sum(value >= score for value in clean), len(clean) + 1)
        assert (score > chosen.value) == (p_value <= exact)


@given(st.integers(1, 500))
def test_an_alpha_that_is_too_small_names_how_many_images_are_enough(alpha: int) -> None:
    exact = Fraction(alpha, 1000)
    enough = math.ceil(1 / exact) - 1
    assert threshold(np.zeros(enough), alpha / 1000).size == enough
    if enough > 0:
        with pytest.raises(UsageError, match=f"at least {enough} calibration images, there are {enough - 1};"):
            threshold(np.zeros(enough - 1), alpha / 1000)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        threshold(np.zeros(100), alpha)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_the_false_alarm_rate_holds_on_average_over_splits(alpha: float) -> None:
    splits, size, held = 400, 199, 200
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(splits):
        scores = generator.gamma(2.0, size=size + held)
        rates.append(float((scores[size:] > threshold(scores[:size], alpha).value).mean()))
    # Given the calibration, the rate is Beta(r, n + 1 - r) with r = alpha (n + 1), and the count binomial on top.
    spread = math.sqrt(alpha * (1 - alpha) * (1 / (size + 2) + 1 / held) / splits)
    assert abs(float(np.mean(rates)) - alpha) <= 4 * spread


CENTRES = unit(3, seed=9)
CLEAN = unit(80, seed=1, around=CENTRES[0])
STAMPED = {"first": unit(80, seed=2, around=CENTRES[1]), "second": unit(80, seed=3, around=CENTRES[2])}


def test_with_triggers_the_score_grows_towards_what_they_produce() -> None:
    screen = Screen(CLEAN, STAMPED, k=4)
    steps = np.linspace(0, 1, 9)[:, None]
    path = ((1 - steps) * CENTRES[0] + steps * CENTRES[1]).astype(np.float32)
    scores = screen.score_samples(path)
    assert screen.score == "trigger match"
    assert (np.diff(scores.values) > 0).all()
    assert scores.values[0] < 0 < scores.values[-1]


def test_each_request_is_matched_with_the_trigger_it_is_nearest_to() -> None:
    screen = Screen(CLEAN, STAMPED, k=4)
    near = np.concatenate([unit(5, seed=4, around=CENTRES[1]), unit(5, seed=5, around=CENTRES[2])])
    matched = [screen.triggers[index] for index in screen.score_samples(near).triggers]
    assert matched == ["first"] * 5 + ["second"] * 5


def test_without_triggers_the_score_is_the_k_distance_and_no_trigger_is_named() -> None:
    screen = Screen(CLEAN, {}, k=4)
    asked = unit(6, seed=7)
    scores = screen.score_samples(asked)
    assert screen.score == "k-distance"
    assert scores.triggers.tolist() == [-1] * 6
    np.testing.assert_array_equal(scores.values, Neighbours(CLEAN, 4).kth_distance(asked))


def test_scores_do_not_depend_on_the_length_of_embeddings_nor_on_their_neighbours_in_the_batch() -> None:
    screen = Screen(CLEAN, STAMPED, k=4)
    asked = unit(6, seed=7)
    together = screen.score_samples(asked).values
    np.testing.assert_allclose(screen.score_samples(17 * asked).values, together, atol=1e-4)
    alone = [float(screen.score_samples(asked[i : i + 1]).values[0]) for i in range(6)]
    np.testing.assert_allclose(alone, together, atol=1e-4)


def test_a_request_that_is_in_a_bank_has_a_finite_score() -> None:
    screen = Screen(CLEAN, STAMPED, k=1)
    values = screen.score_samples(np.concatenate([CLEAN[:3], STAMPED["first"][:3]])).values
    assert np.isfinite(values).all()
    assert (values[:3] < 0).all()
    assert (values[3:] > 0).all()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, 1e30])
def test_an_embedding_that_has_no_direction_is_refused(value: float) -> None:
    asked = unit(3, seed=7)
    asked[1] = value
    with pytest.raises(RequestError, match="zero or not finite"):
        Screen(CLEAN, STAMPED, k=4).score_samples(asked)


@pytest.mark.parametrize("shape", [(24,), (2, 23), (2, 25), (1, 2, 24), (0,)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="cannot be compared with ones of 24"):
        Screen(CLEAN, STAMPED, k=4).score_samples(np.ones(shape, np.float32))


def test_banks_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="embeddings of one length"):
        Screen(CLEAN, {"first": unit(80, 23)}, k=4)


def test_a_bank_smaller_than_k_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 81 needs a bank of at least 81"):
        Screen(CLEAN, {}, k=81)


@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_the_default_k_stays_in_bounds_and_far_below_a_class(bank: int, classes: int) -> None:
    k = default_k(bank, classes)
    assert 2 <= k <= MAX_K
    assert k == 2 or 40 * k * classes <= bank


@pytest.mark.parametrize(("bank", "classes", "k"), [(10, 10, 2), (1200, 10, 3), (1600, 10, 4), (10**6, 10, 16)])
def test_the_default_k_is_a_fortieth_of_a_class(bank: int, classes: int, k: int) -> None:
    assert default_k(bank, classes) == k
