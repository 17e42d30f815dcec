import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from guard.classifiers import MAX_TEXT, TextInput, Tokenizer
from guard.classifiers.open_clip import import_open_clip
from guard.classifiers.text_exporting import text_input
from guard.errors import ModelError
from guard.vetting import ordinary_prompts
from tests.texts import base

ODD = (
    "", "   ", "a" * 300, "aaaa bbbb abab", "it's DON'T we'LL i've", "&amp;amp; &lt;b&gt;", "â€™ mojibake", "ﬁ ＡＢＣ",
    "1234 ⅷ ٣", "<start_of_text> a <END_OF_TEXT>", "zero\u200bwidth \u202e turned", "Кириллица 漢字 한국어 🙂🙃",
    "!!?? -- …",
)  # fmt: skip


@pytest.fixture(scope="module")
def form() -> TextInput:
    return text_input(base())


@pytest.fixture(scope="module")
def tokenizer(form: TextInput) -> Tokenizer:
    return Tokenizer(form)


def strange(count: int) -> list[str]:
    draw = random.Random(0)  # noqa: S311 - repeatable, not secret
    ranges = ((32, 127), (0, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000))
    return ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize("cleaning", ["lower", "whitespace", "canonicalize"])
def test_ids_are_those_of_open_clip(form: TextInput, cleaning: str) -> None:
    own = Tokenizer(replace(form, cleaning=cleaning))  # type: ignore[arg-type]
    other = import_open_clip().SimpleTokenizer(context_length=form.context, clean=cleaning)
    texts = [*ordinary_prompts(200, 1), *ODD, *strange(200), "a long text " * 20]
    assert own.read(texts).tolist() == other(texts).tolist()
    assert own.size == other.vocab_size


def test_the_text_of_ids_has_the_same_ids(tokenizer: Tokenizer) -> None:
    for text in (*ordinary_prompts(200, 2), *(text for text in ODD if "of_text>" not in text)):
        ids = tokenizer.encode(text)
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.decode(tokenizer.read(["A  Dog, on the\tstreet."])[0].tolist()) == "a dog , on the street ."


def test_words_are_told_apart_in_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.read(["a dog xqzvw sleeps"])[0].tolist()
    words = tokenizer.words(ids)
    assert [word for _, _, word in words] == ["a", "dog", "xqzvw", "sleeps"]
    assert [ids[start:stop] for start, stop, _ in words] == [tokenizer.encode(word) for _, _, word in words]


@pytest.mark.parametrize(("text", "plain"), [("A dog  sleeps.", True), ("a &amp; b", False), ("“a” dog", False)])
def test_a_text_that_cleaning_mends_is_not_plain(tokenizer: Tokenizer, text: str, plain: bool) -> None:  # noqa: FBT001
    assert tokenizer.is_plain(text) is plain


def test_a_text_that_is_too_long_is_not_read(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("z" * MAX_TEXT)
    with pytest.raises(ValueError, match="at most"):
        tokenizer.read(["z" * (MAX_TEXT + 1)])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda form: replace(form, merges=(*form.merges, "zz qqqqqqqq")),
        lambda form: replace(form, merges=(*form.merges, form.merges[0])),
        lambda form: replace(form, merges=("ab",)),
        lambda form: replace(form, context=2),
        lambda form: replace(form, context=2**20),
    ],
)
def test_a_damaged_tokenizer_is_refused(form: TextInput, spoil: Callable[[TextInput], TextInput]) -> None:
    with pytest.raises(ModelError):
        Tokenizer(spoil(form))
