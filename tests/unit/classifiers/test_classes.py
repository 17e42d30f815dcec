from pathlib import Path

import pytest

from guard.classifiers import ClassList
from guard.errors import ClassListError


def test_json_round_trip(tmp_path: Path) -> None:
    classes = ClassList(("cat", "Überraschung"), ("a {}.", "the {}"))
    (tmp_path / "classes.json").write_text(classes.to_json(), encoding="utf-8")
    assert ClassList.read(tmp_path / "classes.json") == classes


def test_text_has_one_name_a_line(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\n dog \n", encoding="utf-8")
    assert ClassList.read(tmp_path / "names.txt").names == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (("cat", "dog", "cat"), ("a {}",), "'cat' is listed more than once"),
        (("cat",), ("a {}",), "at least two"),
        (("cat", " "), ("a {}",), "blank"),
        (("cat", "dog"), ("no place",), "exactly one"),
        (("cat", "dog"), ("{} and {}",), "exactly one"),
        (("cat", "dog"), (), "empty"),
    ],
)
def test_unusable_lists_are_refused(names: tuple[str, ...], templates: tuple[str, ...], message: str) -> None:
    with pytest.raises(ClassListError, match=message):
        ClassList(names, templates)


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": "cat"}', '{"classes": [1, 2]}', '{"classes": ["a", "a"]}'])
def test_unusable_files_are_refused_and_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(ClassListError, match=r"bad\.json"):
        ClassList.read(tmp_path / "bad.json")


def test_a_class_name_may_hold_braces() -> None:
    assert ClassList(("{x}", "y"), ("a {}",)).prompts("{x}") == ("a {x}",)
