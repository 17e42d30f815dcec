"""Class names in text files: one on each line, and nothing else.

Files of class names come in many forms: with a column of numbers, with the identifiers of WordNet, as YAML, with
comments. A reader that takes every line for a name makes classes of all of that, and nobody notices, because the result
is a classifier that works a little worse. Therefore a name in a text file consists of what names consist of, and a file
whose lines have something else is refused. JSON takes any name.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = ("", ".txt", ".names", ".labels", ".classes")
_PUNCTUATION = frozenset(" -\u2010\u2011\u2012\u2013\u2014'\u2019\u2018.,&/()!?+%°·:*_@$€£©®™")
_JSON = "; if it is meant so, write the list as JSON, which takes any name"
_SYNSET = re.compile(r"n\d{8}\b")
_COLUMN = re.compile(r"\d+\s*(:\s|,\s*[^\W\d])")
_NUMBER = re.compile(r"(\d+)[\s.):=-]+\S")
_VALUE = re.compile(r"[a-z_]+:\s")
_CELLS = re.compile(r",(?![\s\d])")
_JOINERS = "\u200c\u200d"
"""Characters without width that some scripts need inside of words."""
_STRAY_JOINER = re.compile(f"(?:^|(?<=[\0-\u024f]))([{_JOINERS}])|([{_JOINERS}])(?:$|(?=[\0-\u024f]))")
_BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
"""Letters, marks and symbols that are drawn as nothing."""
_TWINS = str.maketrans(
    "аеорсухіјѕԁһԛԝАВЕКМНОРСТХІЈЅΑΒΕΖΗΙΚΜΝΟΡΤΥΧονϲıɑɡ",  # Cyrillic, Greek, and forms of Latin
    "aeopcyxijsdhqwABEKMHOPCTXIJSABEZHIKMNOPTYXovciag",
)


def check_suffix(path: Path) -> None:
    """Refuse a file that says by its name that it is a table or a document.

    Raises:
        ValueError: The name says so.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"guard does not read lists in the form {path.suffix!r}; it reads JSON (.json), or text with one name on "
            "each line and nothing else (.txt)"
        )


def names_in(data: bytes) -> tuple[str, ...]:
    """The class names in a text file.

    Args:
        data: UTF-8, with or without the mark that Windows puts at the start, and lines that end as on Unix, Windows or
            old Macs. Blank lines are left out, and so is space around a name.

    Raises:
        ValueError: The file is not UTF-8, or a line has something else than a name.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not valid UTF-8 (byte {error.start + 1})") from error
    # Only what ends a line everywhere: other separators stand inside of names, and are refused there.
    numbered = [(number, line.strip(" \t")) for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1)]
    lines = [(number, line) for number, line in numbered if line]
    for number, line in lines:
        if reason := _not_a_name(line):
            raise ValueError(f"line {number} ({line[:40]!a}) {reason}{_JSON}")
    names = tuple(line for _, line in lines)
    if _are_counted(names):
        raise ValueError(f"each line begins with its own number{_JSON}")
    return names


def _not_a_name(line: str) -> str | None:
    """Why a line is something else than a name, or None."""
    if odd := next((each for each in line if not (each in _PUNCTUATION or _is_letter(each))), None):
        name = unicodedata.name(odd, "").lower()
        return f"has the character U+{ord(odd):04X}{name and f' ({name})'}, which names in text files do not have"
    if not (_is_letter(line[0]) or line[0] in "('\u2018.@$€£") or line[-1] in ",:":
        return "begins or ends as no name does"
    if _SYNSET.match(line):
        return "begins with an identifier of WordNet"
    if _COLUMN.match(line):
        return "begins with a column of numbers"
    if _VALUE.match(line):
        return "is a name and a value, as in YAML"
    if _CELLS.search(line):
        return "has a comma and no space behind it, as in a table"
    if line[0] == line[-1] == "'" and len(line) > 1:
        return "is in quotes"
    return None


def _is_letter(character: str) -> bool:
    """Whether this is a letter, a mark on one, or a digit; or joins letters in scripts that need that."""
    return unicodedata.category(character)[0] in "LMN" or character in _JOINERS


def _are_counted(names: Sequence[str]) -> bool:
    numbers = [int(match[1]) for name in names if (match := _NUMBER.match(name)) and len(match[1]) < 8]
    return len(numbers) == len(names) > 1 and numbers in (
        list(range(len(names))),
        list(range(1, len(names) + 1)),
    )


def unseen(name: str) -> str | None:
    """The first character of a name that cannot be seen where the name is shown, or None.

    The characters that join letters are taken where they do so, which is not beside Latin ones.
    """
    if match := _STRAY_JOINER.search(name):
        return match[1] or match[2]
    hidden = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
    return next(
        (each for each in name if each in _BLANKS or (unicodedata.category(each) in hidden and each not in _JOINERS)),
        None,
    )


def looks(name: str) -> str:
    """What a name looks like: equal for names that are encoded otherwise, or written with letters of another script."""
    shown = "".join(each for each in name if each not in _JOINERS and not "\ufe00" <= each <= "\ufe0f")
    return " ".join(unicodedata.normalize("NFKC", shown).translate(_TWINS).split())
