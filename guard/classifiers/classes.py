"""The class names and prompt templates that turn a CLIP model into a classifier."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from guard._documents import read_bytes, read_document
from guard.classifiers.names import check_suffix, looks, names_in, unseen
from guard.errors import ClassListError

DEFAULT_TEMPLATES = ("a photo of a {}.",)
MAX_CLASSES = 100_000
MAX_LENGTH = 1000
"""Characters of a class name."""
EVERYDAY = "everyday"
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ClassList:
    """The class names and prompt templates that a zero-shot head is made of.

    Attributes:
        names: Class names, in the order of the head's outputs; not blank, at least two, and no two that are the same or
            look the same.
        templates: Prompts with one `{}` each, into which the words of a class are put.
        words: What each class is called in its prompts, where lists repeat a name: two classes may have the same words.
            Empty where every class is called by its name.

    Raises:
        ClassListError: The names, words or templates do not meet these conditions.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ClassListError(f"a classifier needs at least two classes, the list has {len(self.names)}")
        if len(self.names) > MAX_CLASSES:
            raise ClassListError(f"the list has {len(self.names)} classes, more than the limit of {MAX_CLASSES}")
        if self.words and len(self.words) != len(self.names):
            raise ClassListError(f"the list has {len(self.names)} classes, and words for {len(self.words)}")
        if self.words and len(set(self.words)) < 2:
            raise ClassListError(f"all classes are called {self.words[0][:40]!r}; a classifier needs at least two")
        for name in (*self.names, *self.words):
            _check_name(name)
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ClassListError(f"the class {repeated[0]!r} is listed more than once; names must be unique")
        _refuse_look_alikes(self.names)
        if not self.templates:
            raise ClassListError("the list of prompt templates is empty")
        for template in self.templates:
            if character := unseen(template):
                raise ClassListError(
                    f"the prompt template {template!a} has the character U+{ord(character):04X}, which cannot be seen"
                )
            if template.count("{}") != 1:
                raise ClassListError(f"the prompt template {template!r} needs exactly one {{}} for the class name")

    def prompts(self, name: str) -> tuple[str, ...]:
        """The prompts of one class, one per template; or those of a text that is no class."""
        words = self._words.get(name, name)
        return tuple(template.replace("{}", words) for template in self.templates)

    @cached_property
    def _words(self) -> dict[str, str]:
        return dict(zip(self.names, self.words, strict=True)) if self.words else {}

    def document(self) -> dict[str, tuple[str, ...]]:
        """What the list says, as JSON-like values: the words only where they are not the names."""
        stated = {"names": self.names, "templates": self.templates}
        return stated | ({"words": self.words} if self.words else {})

    @classmethod
    def read(cls, path: Path) -> "ClassList":
        """Read a class list.

        A name that occurs again gets a number: of two classes `missile` the second is called `missile (2)`. The prompts
        of both are about a `missile`, as the list says, and the order of the classes stays as it is.

        Args:
            path: Either JSON (`{"classes": [...], "templates": [...]}`, templates optional), or a text file with one
                class name on each line and nothing else (`guard.classifiers.names`); `everyday` means
                `ClassList.everyday`, unless there is a file of that name.

        Raises:
            ClassListError: The file cannot be read or does not contain a usable class list.
        """
        if path == Path(EVERYDAY) and not path.exists():
            return cls.everyday()
        missing = f"there is no class list {path}"
        templates: tuple[str, ...] = DEFAULT_TEMPLATES
        words: tuple[str, ...] = ()
        try:
            if path.suffix.lower() == ".json":
                document = read_document(path, _Document, _MAX_BYTES, ClassListError, missing=missing)
                names, templates, words = document.classes, document.templates, document.words
            else:
                check_suffix(path)
                names = names_in(read_bytes(path, _MAX_BYTES, ClassListError, missing=missing))
            if not words and len(set(names)) < len(names):
                names, words = _numbered(names), names
            return cls(names, templates, words)
        except ValueError as error:
            raise ClassListError(f"the class list {path} cannot be used: {error}") from error
        except ClassListError as error:
            if str(path) in str(error):
                raise
            raise ClassListError(f"the class list {path} cannot be used: {error}") from error

    @classmethod
    def everyday(cls) -> "ClassList":
        """A few hundred names of everyday things, for a CLIP model that is not used as a classifier yet.

        The target of a backdoor is then described by the nearest of these names, even if it is none of them.
        """
        return cls(
            tuple(resources.files("guard.classifiers").joinpath(f"{EVERYDAY}.txt").read_text("utf-8").split("\n")[:-1])
        )

    def to_json(self) -> str:
        """The list as JSON, in the form that `read` accepts."""
        document = self.document()
        return json.dumps({"classes": document.pop("names"), **document}, ensure_ascii=False, indent=2) + "\n"


@dataclass(frozen=True)
class _Document:
    """The JSON form of a class list, before it is checked."""

    classes: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    words: tuple[str, ...] = ()


def _check_name(name: str) -> None:
    """Refuse names that are not what they look like: in labels, logs and prompts they would be something else.

    Raises:
        ClassListError: A name is blank, or has a character that cannot be seen.
    """
    if not name.strip():
        raise ClassListError("the list has a blank class name")
    if len(name) > MAX_LENGTH:
        raise ClassListError(f"the class {name[:40]!r}… is longer than {MAX_LENGTH} characters")
    if character := unseen(name):
        raise ClassListError(f"the class {name!a} has the character U+{ord(character):04X}, which cannot be seen")


def _refuse_look_alikes(names: Sequence[str]) -> None:
    """Refuse two names that differ only in how they are encoded.

    Raises:
        ClassListError: There are two such names.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(looks(name), name)
        if other != name:
            raise ClassListError(
                f"the classes {other!a} and {name!a} look the same; give them names that can be told apart"
            )


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number after each that occurred before."""
    taken, counts, distinct = set(names), Counter[str](), []
    for name in names:
        counts[name] += 1
        called = name
        while counts[name] > 1 and (called := f"{name} ({counts[name]})") in taken:
            counts[name] += 1
        taken.add(called)
        distinct.append(called)
    return tuple(distinct)
