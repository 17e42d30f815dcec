import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from guard._documents import first_error, read_bytes, read_document, read_json, read_object, read_text
from guard.errors import ClassListError, ModelError


@dataclass(frozen=True)
class Part:
    size: int
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ClassListError("nobody has thirteen")
        if self.size < 0:
            raise ValueError("a size is not negative")


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.json"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "it is not valid UTF-8"),
        (b"\xef\xbb\xbf{}", "it is not valid JSON"),
        ('{"parts": []}'.encode("utf-16"), "it is not valid UTF-8"),
        (b"", "it is not valid JSON"),
        (b"{", "it is not valid JSON"),
        (b"{} {}", "it is not valid JSON"),
        (b"[NaN]", "it holds the number NaN"),
        (b"[-Infinity]", "it holds the number -Infinity"),
        (b"[1e999]", "it holds the number 1e999"),
        (b"[" + b"9" * 5000 + b"]", "4300 digits"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'["\\ud800"]', "it holds half of a surrogate pair"),
        (b'{"\\udfff": 1}', "it holds half of a surrogate pair"),
        (b'[{"a": 1, "b": 2, "a": 3}]', "the name a occurs twice in one object"),
        (b'{"a\\n": 1, "a\\n": 2}', "the name 'a\\n' occurs twice in one object"),
    ],
)
def test_what_is_not_json_by_the_letter_is_refused_in_one_line(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_json(path, 1_000_000, ModelError)
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_json_is_read(path: Path) -> None:
    path.write_text('{"\\ud83d\\ude00": [1, 1.5e300, null, "ä"], "": {"": 0}}', encoding="utf-8")
    assert read_json(path, 1000, ModelError) == {"😀": [1, 1.5e300, None, "ä"], "": {"": 0}}


def directory(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [directory, pipe, link_to_a_device])
def test_only_regular_files_are_read(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(ModelError, match=r"cannot read .*document\.json: (it is not a regular file|Is a directory)"):
        read_bytes(path, 1000, ModelError)


def test_a_file_is_read_up_to_its_limit_and_through_a_link(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(tmp_path / "link", 5, ModelError) == b"12345"
    with pytest.raises(ModelError, match=r"document\.json is larger than 4 bytes"):
        read_bytes(path, 4, ModelError)


def test_a_missing_file_is_named_or_said_in_the_callers_words(path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*document\.json"):
        read_text(path, 10, ModelError)
    with pytest.raises(ModelError, match=r"^nothing here$"):
        read_text(path, 10, ModelError, missing="nothing here")


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_another_value_than_an_object_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ModelError, match="does not hold a JSON object"):
        read_object(path, 10, ModelError)


def test_a_document_becomes_what_describes_it(path: Path) -> None:
    path.write_text('{"parts": [{"size": 1}, {"size": 2, "kind": "b"}], "more": 1}')
    for strict in (False, True):
        assert read_document(path, Whole, 100, ModelError, strict=strict) == Whole((Part(1), Part(2, "b")))


def test_a_conversion_is_refused_where_that_is_asked(path: Path) -> None:
    path.write_text('{"parts": [{"size": "1"}]}')
    assert read_document(path, Whole, 100, ModelError) == Whole((Part(1),))
    with pytest.raises(ModelError, match=r"parts\.1\.size: Input should be a valid integer, not '1'$"):
        read_document(path, Whole, 100, ModelError, strict=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "it must be an object with names and values"),
        ('{"parts": 3}', "parts: Input should be a valid tuple, not 3"),
        ('{"parts": [{"size": 1}, {}]}', "parts.2.size: it is missing"),
        ('{"parts": [{"size": 1, "kind": "c"}]}', "parts.1.kind: Input should be 'a' or 'b', not 'c'"),
        ('{"parts": [{"size": -1}]}', "parts.1: a size is not negative"),
        ('{"parts": [{"size": 13}]}', "nobody has thirteen"),
    ],
)
def test_the_first_error_says_where_and_what(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ModelError) as caught:
        read_document(path, Whole, 100, ModelError)
    assert str(caught.value) == f"{path} is damaged: {message}"


def test_names_and_values_of_others_are_quoted_shortly_and_in_one_line() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, int]).validate_python({"a\x1b[31m\n": "x" * 1000})
    message = first_error(caught.value)
    assert message.isprintable()
    assert len(message) < 300


def test_a_name_that_is_not_known_is_said_without_its_value() -> None:
    class Closed(BaseModel, extra="forbid"):
        known: int = 0

    with pytest.raises(ValidationError) as caught:
        Closed.model_validate({"unknown": "secret"})
    assert first_error(caught.value) == "unknown: there is no such name"
