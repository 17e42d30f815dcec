"""Second opinions on synthetic embeddings: a suspect, a reference model that it departs from under a trigger."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from guard.errors import RequestError
from guard.screening import (
    DENSITY,
    DIVERGENCE,
    JOINT,
    RESIDUAL,
    Banks,
    Detector,
    ReferenceAnswers,
    Screen,
    SecondOpinion,
    match,
)

Floats = NDArray[np.float32]
DIMENSION, WIDTH, CLASSES, SCALE = 24, 16, 4, 20.0
_FIXED = np.random.default_rng(0)
CENTRES = np.linalg.qr(_FIXED.normal(size=(DIMENSION, DIMENSION)))[0][:CLASSES]
MAP = _FIXED.normal(size=(DIMENSION, WIDTH)) / np.sqrt(DIMENSION)
HEAD = CENTRES.T.astype(np.float32)


def unit(values: NDArray[np.floating]) -> Floats:
    found: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return found


def world(count: int, seed: int, *, honest: float = 0.02) -> tuple[Floats, ReferenceAnswers]:
    """Clean images: what both models compute, and differ in by a little noise."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(CLASSES, size=count)
    ours = unit(CENTRES[classes] + 0.1 * generator.normal(size=(count, DIMENSION)))
    theirs = unit(ours @ MAP + honest * generator.normal(size=(count, WIDTH)))
    logits = SCALE * (ours + honest * generator.normal(size=ours.shape)) @ HEAD
    return ours, ReferenceAnswers(theirs, logits.astype(np.float32))


def attacked(count: int, seed: int) -> tuple[Floats, ReferenceAnswers]:
    """The suspect goes to class 0, in the middle of its genuine images; the reference model sees what is there."""
    ours, answers = world(count, seed)
    chosen = (ours @ HEAD).argmax(1) != 0
    genuine, _ = world(4 * count, seed + 1)
    genuine = genuine[(genuine @ HEAD).argmax(1) == 0][: chosen.sum()]
    return genuine, answers[np.flatnonzero(chosen)[: len(genuine)]]


@pytest.fixture(scope="module")
def screen() -> Screen:
    clean, answers = world(600, 1)
    return Screen(Banks.fit(clean, {}, HEAD, k=4, answers=answers, scale=SCALE))


def detector(screen: Screen, *, near_only: bool = False, alpha: float = 0.01) -> Detector:
    clean, answers = world(1000, 2)
    return Detector(screen, screen.score_samples(clean, answers), alpha, near_only=near_only)


def test_the_divergence_is_jeffreys_of_softened_distributions(screen: Screen) -> None:
    ours, answers = world(50, 3)
    p, q = softmax(SCALE / 2 * ours @ HEAD, axis=1), softmax(answers.logits / 2, axis=1)
    expected = (p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)
    found = screen.score_samples(ours, answers).parts[DIVERGENCE]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)


def test_the_residual_of_requests_is_as_long_as_that_of_the_bank() -> None:
    """Few images and many dimensions: in-sample residuals would be much shorter."""
    clean, answers = world(60, 4)
    opinion, own = SecondOpinion.fit(clean, answers, HEAD, SCALE)
    later = opinion.residual(*world(2000, 5))
    assert abs(np.median(later) / np.median(own[RESIDUAL]) - 1) < 0.15


def test_what_no_other_score_sees_is_flagged(screen: Screen) -> None:
    ours, answers = attacked(400, 6)
    judging = detector(screen)
    assert judging.score(ours).flags.mean() < 0.05
    found = judging.score(ours, answers)
    assert found.flags.mean() > 0.95
    assert set(found.scores.decided_by) <= {DIVERGENCE, RESIDUAL}
    assert (found.scores.answers != found.scores.classes).all()


def test_what_match_and_divergence_only_suspect_is_flagged_by_both_together() -> None:
    clean, answers = world(600, 1)
    generator = np.random.default_rng(3)
    direction = generator.normal(size=DIMENSION) / np.sqrt(DIMENSION)
    banks = Banks.fit(clean, {"patch-0": unit(clean + 0.4 * direction)}, HEAD, k=4, answers=answers, scale=SCALE)
    judging = detector(Screen(banks))
    ours = unit(world(1000, 10)[0] + 0.2 * direction)
    logits = SCALE * ours @ HEAD + 1.5 * generator.normal(size=(len(ours), CLASSES))
    found = judging.score(ours, ReferenceAnswers(unit(ours @ MAP), logits.astype(np.float32)))
    alone = judging.part_p_values(found.scores)
    best = max((alone[name] <= judging.alpha).mean() for name in (match("patch-0"), DIVERGENCE))
    assert found.flags.mean() > best + 0.05
    assert found.scores.decided_by.count(JOINT) > 0.9 * len(ours)
    assert judging.score(*world(4000, 12)).flags.mean() < 0.02


@pytest.mark.parametrize("near_only", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_rate_of_false_alarms_holds_whoever_is_asked(screen: Screen, share: float, near_only: bool) -> None:  # noqa: FBT001
    judging = detector(screen, near_only=near_only, alpha=0.05)
    ours, answers = world(6000, 7)
    scores = screen.score_samples(ours)
    asked = screen.near(scores) if near_only else np.random.default_rng(0).random(len(ours)) < share
    rows = np.flatnonzero(asked)
    if len(rows):
        scores = screen.with_opinion(scores, answers[rows], rows)
    assert scores.asked.tolist() == asked.tolist()
    # Beta(50, 951) of the calibration has a standard deviation of 0.7 points.
    assert 0.025 < judging.judge(scores).flags.mean() < 0.075


def test_about_the_stated_share_of_clean_requests_is_near(screen: Screen) -> None:
    ours, _ = world(4000, 8)
    assert 0.25 < screen.near(screen.score_samples(ours)).mean() < 0.36


def test_a_missing_opinion_is_no_number_and_feeds_no_stream(screen: Screen) -> None:
    ours, answers = world(4, 9)
    rows = np.array([1, 3])
    scores = screen.with_opinion(screen.score_samples(ours), answers[rows], rows)
    assert np.isnan(scores.parts[DIVERGENCE]).tolist() == [True, False, True, False]
    assert np.isfinite(scores.values).all()
    watched = [set(each) & {DIVERGENCE, RESIDUAL} for each in detector(screen).observations(scores)]
    assert watched == [set(), {DIVERGENCE, RESIDUAL}, set(), {DIVERGENCE, RESIDUAL}]
    assert [name for name in scores.decided_by if name != DENSITY and name not in {DIVERGENCE, RESIDUAL}] == []


def test_streams_of_a_second_opinion_need_requests_that_nobody_picked(screen: Screen) -> None:
    names = {stream.name for stream in detector(screen).streams()}
    assert {DIVERGENCE, RESIDUAL} <= names
    assert not {DIVERGENCE, RESIDUAL} & {stream.name for stream in detector(screen, near_only=True).streams()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda each: replace(each, embeddings=each.embeddings[:, 1:]), "not those of the reference"),
        (lambda each: replace(each, logits=each.logits[:, 1:]), "not those of the reference"),
        (lambda each: replace(each, logits=np.full_like(each.logits, np.nan)), "not finite"),
        (lambda each: replace(each, embeddings=np.full_like(each.embeddings, np.inf)), "not finite"),
    ],
)
def test_answers_that_do_not_fit_are_refused(screen: Screen, spoil: object, message: str) -> None:
    ours, answers = world(5, 10)
    with pytest.raises(RequestError, match=message):
        screen.score_samples(ours, spoil(answers))  # type: ignore[operator] # a lambda


def test_a_reference_model_that_tells_nothing_is_refused() -> None:
    clean, answers = world(50, 11)
    constant = replace(answers, embeddings=np.ones_like(answers.embeddings))
    with pytest.raises(ValueError, match="same embedding to every image"):
        SecondOpinion.fit(clean, constant, HEAD, SCALE)
    itself = ReferenceAnswers(clean, (SCALE * clean @ HEAD).astype(np.float32))
    with pytest.raises(ValueError, match="it is the same model"):
        SecondOpinion.fit(clean[:, :], itself, HEAD, SCALE)


def test_without_a_reference_model_there_is_no_opinion() -> None:
    clean, answers = world(100, 12)
    alone = Screen(Banks.fit(clean, {}, HEAD, k=4))
    assert not alone.near(alone.score_samples(clean)).any()
    with pytest.raises(ValueError, match="needs a reference model"):
        alone.score_samples(clean, answers)
