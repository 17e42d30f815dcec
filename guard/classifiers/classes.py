"""The class names and prompt templates that turn a CLIP model into a classifier."""

import json
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from guard._documents import read_document, read_text
from guard.errors import ClassListError

DEFAULT_TEMPLATES = ("a photo of a {}.",)
MAX_CLASSES = 100_000
EVERYDAY = "everyday"
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ClassList:
    """The class names and prompt templates that a zero-shot head is made of.

    Attributes:
        names: Class names, in the order of the head's outputs; unique, not blank, at least two.
        templates: Prompts with one `{}` each, into which a name is put.

    Raises:
        ClassListError: The names or the templates do not meet these conditions.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ClassListError(f"a classifier needs at least two classes, the list has {len(self.names)}")
        if len(self.names) > MAX_CLASSES:
            raise ClassListError(f"the list has {len(self.names)} classes, more than the limit of {MAX_CLASSES}")
        if any(not name.strip() for name in self.names):
            raise ClassListError("the list has a blank class name")
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ClassListError(f"the class {repeated[0]!r} is listed more than once; names must be unique")
        if not self.templates:
            raise ClassListError("the list of prompt templates is empty")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ClassListError(f"the prompt template {template!r} needs exactly one {{}} for the class name")

    def prompts(self, name: str) -> tuple[str, ...]:
        """The prompts of one class, one per template."""
        return tuple(template.replace("{}", name) for template in self.templates)

    @classmethod
    def read(cls, path: Path) -> "ClassList":
        """Read a class list.

        Args:
            path: Either JSON (`{"classes": [...], "templates": [...]}`, templates optional), or text with one class
                name on each line; `everyday` means `ClassList.everyday`, unless there is a file of that name.

        Raises:
            ClassListError: The file cannot be read or does not contain a usable class list.
        """
        if path == Path(EVERYDAY) and not path.exists():
            return cls.everyday()
        missing = f"there is no class list {path}"
        if path.suffix.lower() == ".json":
            document = read_document(path, _Document, _MAX_BYTES, ClassListError, missing=missing)
            names, templates = document.classes, document.templates
        else:
            lines = read_text(path, _MAX_BYTES, ClassListError, missing=missing).splitlines()
            names, templates = tuple(line.strip() for line in lines if line.strip()), DEFAULT_TEMPLATES
        try:
            return cls(names, templates)
        except ClassListError as error:
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
        return json.dumps({"classes": self.names, "templates": self.templates}, ensure_ascii=False, indent=2) + "\n"


@dataclass(frozen=True)
class _Document:
    """The JSON form of a class list, before it is checked."""

    classes: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
