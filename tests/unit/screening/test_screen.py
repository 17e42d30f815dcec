import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.covariance import oas as reference_oas

from guard.errors import RequestError
from guard.screening import DENSITY, MAX_K, Banks, Detector, Neighbours, Screen, Tail, Whitening, default_k, match
from guard.screening.hygiene import triggered
from guard.screening.whitening import oas

Floats = NDArray[np.float32]
DIMENSION, CLASSES = 24, 4
SPREAD = np.geomspace(0.5, 0.02, DIMENSION)
"""Images of a class differ much in the first directions, and little in the last."""
CENTRES = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMENSION, DIMENSION)))[0][:CLASSES]


def unit(values: NDArray[Any]) -> Floats:
    normalised: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return normalised


def embeddings(count: int, *, seed: int) -> Floats:
    """Clean images of all classes."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(CLASSES, size=count)
    return unit(CENTRES[classes] + SPREAD * generator.normal(size=(count, DIMENSION)))


def with_trigger(clean: Floats, target: int, direction: int) -> Floats:
    """As a backdoor does it: towards the target, and off its genuine images by little, in a quiet direction."""
    step = np.zeros(DIMENSION)
    step[direction] = 0.2
    return unit(0.15 * clean + CENTRES[target] + step)


HEAD = CENTRES.T.astype(np.float32)
CLEAN = embeddings(400, seed=1)
STAMPED = {"first": with_trigger(CLEAN, 1, -1), "second": with_trigger(CLEAN, 2, -2)}
BANKS = Banks.fit(CLEAN, STAMPED, HEAD, k=4)


def test_the_shrinkage_is_that_of_scikit_learn() -> None:
    values = np.random.default_rng(0).normal(size=(50, 20)) * SPREAD[:20]
    values -= values.mean(0)
    expected = reference_oas(values, assume_centered=True)[1]
    assert oas(values.T @ values / 50, 50) == pytest.approx(expected)
    assert oas(np.eye(4), 10) == 1


def test_whitening_makes_the_spread_within_classes_alike_in_all_directions() -> None:
    classes = (CLEAN @ HEAD).argmax(1)
    whitening = Whitening.fit(CLEAN, classes)
    moved = (CLEAN - whitening.mean) @ whitening.matrix
    apart = np.concatenate([moved[classes == k] - moved[classes == k].mean(0) for k in range(CLASSES)])
    spread = apart.std(0)
    before = np.concatenate([CLEAN[classes == k] - CLEAN[classes == k].mean(0) for k in range(CLASSES)]).std(0)
    assert before.max() / before.min() > 10
    assert spread.max() / spread.min() < 4  # not 1, because of the shrinkage
    np.testing.assert_allclose(np.linalg.norm(whitening(3 * CLEAN), axis=1), 1, atol=1e-5)


def test_whitening_with_few_images_shrinks_more() -> None:
    few, many = (Whitening.fit(CLEAN[:n], (CLEAN[:n] @ HEAD).argmax(1)).shrinkage for n in (30, 400))
    assert few > many >= 0.05


def test_the_mean_itself_has_a_place() -> None:
    whitening = Whitening.fit(CLEAN, np.zeros(len(CLEAN), np.int64))
    exact = Whitening(np.array([1, 0], np.float32), np.eye(2, dtype=np.float32), 0.1)
    assert np.linalg.norm(exact(np.array([[5, 0]], np.float32))) == pytest.approx(1)
    assert np.isfinite(whitening(whitening.mean[None])).all()


def test_embeddings_that_do_not_differ_say_nothing() -> None:
    with pytest.raises(ValueError, match="all the same"):
        Whitening.fit(np.repeat(CLEAN[:1], 50, 0), np.zeros(50, np.int64))


def test_the_score_grows_towards_what_a_trigger_produces() -> None:
    start, end = CLEAN[:1], STAMPED["first"][:1]
    steps = np.linspace(0, 1, 9)[:, None]
    scores = Screen(BANKS).score_samples(unit((1 - steps) * start + steps * end))
    assert scores.values[-1] > scores.values[0]
    assert scores.parts[match("first")][0] < 0 < scores.parts[match("first")][-1]
    assert set(scores.parts) == {DENSITY, match("first"), match("second")}


def test_each_request_is_matched_with_the_trigger_it_is_nearest_to() -> None:
    fresh = embeddings(10, seed=4)
    screen = Screen(BANKS)
    found = screen.score_samples(np.concatenate([with_trigger(fresh, 1, -1), with_trigger(fresh, 2, -2)]))
    assert [screen.triggers[index] for index in found.triggers] == ["first"] * 10 + ["second"] * 10
    assert found.classes.tolist() == [1] * 10 + [2] * 10


def test_without_triggers_density_alone_decides_and_no_trigger_is_named() -> None:
    screen = Screen(Banks.fit(CLEAN, {}, HEAD, k=4))
    asked = np.concatenate([embeddings(20, seed=7), unit(np.random.default_rng(8).normal(size=(20, DIMENSION)))])
    scores = screen.score_samples(asked)
    assert scores.triggers.tolist() == [-1] * 40
    assert set(scores.parts) == {DENSITY}
    assert (scores.values.argsort() == scores.parts[DENSITY].argsort()).all()
    assert np.median(scores.values[20:]) > np.max(scores.values[:20])


def test_a_request_far_from_everything_is_suspicious_though_it_matches_no_trigger() -> None:
    screen = Screen(BANKS)
    strange = unit(np.random.default_rng(8).normal(size=(20, DIMENSION)))
    assert np.median(screen.score_samples(strange).values) > np.max(screen.score_samples(CLEAN).values)


def quiet_trigger(clean: Floats, target: int) -> Floats:
    """One that leaves an image's spread as it is: a genuine image of the target, but for one quiet direction."""
    moved = clean - CENTRES[(clean @ HEAD).argmax(1)] + CENTRES[target]
    moved[:, -1] += 0.15
    return unit(moved)


def test_triggered_requests_are_told_from_genuine_images_of_the_target_class() -> None:
    """What the whitening is for: this trigger moves embeddings where Euclidean distances do not look."""
    clean, requests = embeddings(1500, seed=3), embeddings(1500, seed=4)
    screen = Screen(Banks.fit(CLEAN, {"first": quiet_trigger(CLEAN, 1)}, HEAD, k=4))
    detector = Detector(screen, screen.score_samples(clean), 0.01)
    found = detector.score(quiet_trigger(requests, 1)).flags.mean()
    genuine = detector.score(requests[(requests @ HEAD).argmax(1) == 1])
    raw = Neighbours(CLEAN), Neighbours(quiet_trigger(CLEAN, 1))

    def euclidean(values: Floats) -> NDArray[Any]:
        return np.subtract(*(np.log(bank.search(values, 4).distances[:, -1]) for bank in raw))

    limit = np.quantile(euclidean(clean), 0.99)
    assert found > 0.95
    assert genuine.flags.mean() < 0.06
    assert (euclidean(quiet_trigger(requests, 1)) > limit).mean() < 0.5


def test_parts_have_p_values_of_their_own() -> None:
    screen = Screen(BANKS)
    detector = Detector(screen, screen.score_samples(embeddings(999, seed=3)), 0.01)
    asked = screen.score_samples(with_trigger(embeddings(50, seed=4), 1, -1))
    found = detector.part_p_values(asked)
    assert set(found) == set(asked.parts)
    assert np.median(found[match("first")]) <= 0.002
    assert np.median(found[match("second")]) > 0.05


def test_scores_do_not_depend_on_the_length_of_embeddings_nor_on_their_neighbours_in_the_batch() -> None:
    screen, asked = Screen(BANKS), embeddings(6, seed=7)
    together = screen.score_samples(asked).values
    np.testing.assert_allclose(screen.score_samples(17 * asked).values, together, atol=1e-3)
    alone = [float(screen.score_samples(asked[i : i + 1]).values[0]) for i in range(6)]
    np.testing.assert_allclose(alone, together, atol=1e-3)


def test_the_order_of_the_banks_does_not_matter() -> None:
    order = np.random.default_rng(2).permutation(len(CLEAN))
    shuffled = Banks.fit(CLEAN[order], {name: bank[order] for name, bank in STAMPED.items()}, HEAD, k=4)
    asked = embeddings(20, seed=7)
    np.testing.assert_allclose(
        Screen(shuffled).score_samples(asked).values, Screen(BANKS).score_samples(asked).values, atol=2e-2
    )


def test_a_request_that_is_in_a_bank_has_a_finite_score() -> None:
    values = Screen(BANKS).score_samples(np.concatenate([CLEAN[:3], STAMPED["first"][:3]])).values
    assert np.isfinite(values).all()
    assert values[:3].max() < values[3:].min()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, 1e30])
def test_an_embedding_that_has_no_direction_is_refused(value: float) -> None:
    asked = embeddings(3, seed=7)
    asked[1] = value
    with pytest.raises(RequestError, match="zero or not finite"):
        Screen(BANKS).score_samples(asked)


@pytest.mark.parametrize("shape", [(24,), (2, 23), (2, 25), (1, 2, 24), (0,)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="cannot be compared with ones of 24"):
        Screen(BANKS).score_samples(np.ones(shape, np.float32))


def test_banks_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="the same images"):
        Banks.fit(CLEAN, {"first": STAMPED["first"][:-1]}, HEAD, k=4)


@pytest.mark.parametrize("k", [0, 400, 401])
def test_a_k_that_the_bank_does_not_support_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} needs more than"):
        Banks.fit(CLEAN, STAMPED, HEAD, k=k)


def test_a_tail_puts_scores_of_any_unit_on_one_scale() -> None:
    scores = np.random.default_rng(0).exponential(size=5000)
    one, other = Tail.fit(scores, 1.0), Tail.fit(1000 * scores - 7, 1.0)
    np.testing.assert_allclose(one.pure(scores), other.pure(1000 * scores - 7), atol=1e-3)
    # Of the tenth that lies in the tail, e⁻³ lie above 3.
    assert (one.pure(scores) > 3).mean() == pytest.approx(0.1 * math.exp(-3), rel=0.4)
    assert np.isfinite(Tail.fit(np.zeros(10), 0.5).surprise(np.ones(1))).all()


@pytest.mark.parametrize("share", [0.0025, 0.01, 0.05])
def test_triggered_images_in_the_bank_are_found(share: float) -> None:
    poisoned, count = CLEAN.copy(), round(share * len(CLEAN))
    rows = np.random.default_rng(5).choice(len(CLEAN), count, replace=False)
    poisoned[rows] = with_trigger(embeddings(count, seed=6), 1, -1)
    stamped = {"first": (1, with_trigger(poisoned, 1, -1)), "second": (2, STAMPED["second"])}
    found = triggered(poisoned, stamped, HEAD, k=4)
    assert set(rows.tolist()) <= set(found)
    assert len(found) - count <= 2
    assert {found[row] for row in rows.tolist()} == {"first"}


def test_a_clean_bank_loses_next_to_nothing() -> None:
    stamped = {"first": (1, STAMPED["first"]), "second": (2, STAMPED["second"])}
    assert len(triggered(CLEAN, stamped, HEAD, k=4)) <= 2
    assert triggered(CLEAN, {}, HEAD, k=4) == {}


@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_the_default_k_stays_in_bounds_and_far_below_a_class(bank: int, classes: int) -> None:
    k = default_k(bank, classes)
    assert 2 <= k <= MAX_K
    assert k == 2 or 40 * k * classes <= bank


@pytest.mark.parametrize(("bank", "classes", "k"), [(10, 10, 2), (1200, 10, 3), (1600, 10, 4), (10**6, 10, 16)])
def test_the_default_k_is_a_fortieth_of_a_class(bank: int, classes: int, k: int) -> None:
    assert default_k(bank, classes) == k
