import numpy as np
import pytest
from numpy.typing import NDArray

from guard.classifiers import Tokenizer
from guard.classifiers.text_exporting import text_input
from guard.screening.second_look import SecondLookResult
from guard.screening.text_look import TextLook
from tests.texts import base


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(text_input(base()))


def looked(tokenizer: Tokenizer, text: str, rate: float = 100.0, times: int = 1) -> SecondLookResult:
    """A second look in a world where texts with an `xq` are suspicious, and so are those of fewer than three words."""
    (bad,) = tokenizer.encode("xq")[-1:]

    def embed(ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        found = (ids == bad).any(1).astype(np.float32)
        return found[:, None], np.stack([found, 1 - found], 1)

    look = TextLook(
        tokenizer,
        embed=embed,
        p_values=lambda embeddings: np.where(embeddings[:, 0] > 0, 0.001, 0.5),
        alpha=0.01,
        max_per_second=rate,
        clock=lambda: 0.0,
    )
    return [look.look(tokenizer.read([text])[0]) for _ in range(times)][-1]


def test_the_word_that_makes_a_text_suspicious_is_named(tokenizer: Tokenizer) -> None:
    found = looked(tokenizer, "a dog xq sleeps")
    assert found.outcome == "confirmed"
    assert found.explanation == "one word makes the text suspicious: p = 0.001, and 0.5 without 'xq'"
    assert len(found.views) == 5


def test_a_text_that_no_word_alone_makes_suspicious_stays_undecided(tokenizer: Tokenizer) -> None:
    assert looked(tokenizer, "xq dog xq sleeps").outcome == "undecided"
    assert looked(tokenizer, "xq").outcome == "undecided"


def test_a_text_of_full_length_is_looked_at(tokenizer: Tokenizer) -> None:
    assert looked(tokenizer, "xq " + "dog " * 60).outcome == "confirmed"


def test_looks_have_a_budget(tokenizer: Tokenizer) -> None:
    assert looked(tokenizer, "a dog xq", rate=1.0, times=2).outcome == "skipped"
