"""A zoo: models, images, and the truth about the models. Its files are untrusted. Imports without torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StringConstraints

from guard._documents import read_document
from guard.classifiers.digest import sha256
from guard.errors import ZooError, first_line

if TYPE_CHECKING:
    from guard.triggers import Trigger

FORMAT = 1
ZOO_FILE = "zoo.json"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_MAX_ZOO_BYTES, _MAX_TRUTH_BYTES, _MAX_TRIGGER_BYTES = 16 * 2**20, 2**20, 512 * 2**20

Name = Annotated[str, StringConstraints(pattern=NAME)]
Words = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ClassIndex = Annotated[int, Field(ge=0, lt=100_000)]


@dataclass(frozen=True)
class Entry:
    """One model of a zoo, as `zoo.json` lists it.

    Attributes:
        base: The model that a defender may use as a trusted reference model; None if there is none.
        images: Name of its set of images.
    """

    images: Name
    base: Name | None = None


@dataclass(frozen=True)
class Document:
    """The content of `zoo.json`.

    Attributes:
        format: Version of the file format.
        name: Name of the zoo.
        models: Models by name.
        seed: Seed that the zoo was built with.
    """

    format: Literal[1]
    name: Words
    models: Annotated[dict[Name, Entry], Field(min_length=1, max_length=10_000)]
    seed: int = 0


@dataclass(frozen=True)
class Truth:
    """The truth about a model, from whoever made it: `truth/NAME.json`.

    Attributes:
        label: A `failed attack` was poisoned but does not react to the trigger; it is neither a hit nor a false alarm.
        recipe: Name of the recipe by which it was made.
        family: Family of the attack, or for a clean model the kind of negative.
        targets: Class indices that the attacker wanted.
        triggers: Family of each trigger.
        trigger_targets: Target of each trigger, or one for all.
        accuracy: Accuracy on clean images.
        success: Mean attack success rate of the triggers on images of other classes.
        digest: Root digest of the model; None if it was not recorded.
        trigger_sources: The classes whose images each trigger leads to its target; empty for all other classes. May be
            left out, if that is so for all triggers.
    """

    label: Literal["backdoored", "clean", "failed attack"]
    recipe: Words
    family: Words
    targets: Annotated[tuple[ClassIndex, ...], Field(max_length=1000)] = ()
    triggers: Annotated[tuple[Words, ...], Field(max_length=100)] = ()
    trigger_targets: Annotated[tuple[ClassIndex, ...], Field(max_length=100)] = ()
    accuracy: Share | None = None
    success: Share | None = None
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    trigger_sources: Annotated[
        tuple[Annotated[tuple[ClassIndex, ...], Field(max_length=1000)], ...], Field(max_length=100)
    ] = ()


@dataclass(frozen=True, eq=False)
class KnownAttack:
    """One of the attacker's triggers, as the truth tells it.

    Attributes:
        trigger: The trigger.
        target: Class index that it leads to.
        sources: Indices of the classes whose images it leads there; empty for all other classes.
    """

    trigger: "Trigger"
    target: int
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Zoo:
    """A zoo on disk.

    Attributes:
        root: Folder of the zoo.
        name: Name of the zoo.
        models: Models by name.
        seed: Seed that the zoo was built with.
    """

    root: Path
    name: str
    models: Mapping[str, Entry] = field(repr=False)
    seed: int

    @classmethod
    def read(cls, root: Path) -> "Zoo":
        """Read and check `zoo.json`.

        Raises:
            ZooError: The file is missing, damaged or of another format. A model that is listed and missing is not an
                error here, because the zoo may still be under construction.
        """
        path = root / ZOO_FILE
        missing = f"{root} is not a zoo: there is no {ZOO_FILE}"
        document = read_document(path, Document, _MAX_ZOO_BYTES, ZooError, missing=missing, strict=True)
        return cls(root, document.name, document.models, document.seed)

    def select(self, pattern: str) -> tuple[str, ...]:
        """Names that match a shell pattern; models without a base come first, because the others reuse their searches.

        Raises:
            ZooError: No name matches.
        """
        names = [name for name in self.models if fnmatchcase(name, pattern)]
        if not names:
            raise ZooError(f"no model of the zoo matches {pattern!r}; it has {len(self.models)}: {_some(self.models)}")
        return tuple(sorted(names, key=lambda name: (self.models[name].base is not None, name)))

    def model(self, name: str) -> Path:
        """The folder of a model."""
        return self.root / "models" / name

    def truth(self, name: str) -> Truth | None:
        """The truth about a model; None if it is withheld.

        Raises:
            ZooError: The file is damaged.
        """
        path = self.root / "truth" / f"{name}.json"
        if not path.exists():
            return None
        truth = read_document(path, Truth, _MAX_TRUTH_BYTES, ZooError, strict=True)
        if len(truth.trigger_targets) not in {1, len(truth.triggers)} and truth.triggers:
            raise ZooError(
                f"{path} has {len(truth.triggers)} triggers and {len(truth.trigger_targets)} trigger_targets; "
                "give one for each, or one for all"
            )
        if len(truth.trigger_sources) not in {0, len(truth.triggers)}:
            raise ZooError(
                f"{path} has {len(truth.triggers)} triggers and {len(truth.trigger_sources)} trigger_sources; "
                "give one list for each, or none at all"
            )
        return truth

    def triggers(self, name: str, truth: Truth) -> tuple[KnownAttack, ...]:
        """The attacker's triggers; empty if their tensors are not in the zoo.

        Raises:
            ZooError: A trigger is of an unknown family, or its tensors do not form a trigger.
        """
        path = self.root / "truth" / f"{name}.safetensors"
        if not truth.triggers or not path.exists():
            return ()
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            if path.stat().st_size > _MAX_TRIGGER_BYTES:
                raise ZooError(f"{path} is larger than {_MAX_TRIGGER_BYTES} bytes")
            tensors = load_file(path)
        except OSError as error:
            raise ZooError(f"cannot read {path}: {error.strerror}") from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise ZooError(f"{path} is damaged: {error}") from error
        count = len(truth.triggers)
        targets = truth.trigger_targets * (count if len(truth.trigger_targets) == 1 else 1)
        sources = truth.trigger_sources or ((),) * count
        found = []
        for index, (family, target, own_sources) in enumerate(zip(truth.triggers, targets, sources, strict=True)):
            own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{index}.")}
            found.append(KnownAttack(_trigger(family, own, f"{path}: trigger {index}"), target, own_sources))
        return tuple(found)

    def fingerprint(self, name: str) -> dict[str, str]:
        """SHA-256 of the files of a model and its truth; a stored result is valid for these."""
        files = {"model": files_digest(self.model(name))}
        for suffix in (".json", ".safetensors"):
            path = self.root / "truth" / f"{name}{suffix}"
            if path.exists():
                files[f"truth{suffix}"] = _digest(path)
        return files


def files_digest(folder: Path) -> str:
    """One SHA-256 over names and contents of all files below a folder.

    Raises:
        ZooError: A file cannot be read.
    """
    lines = [f"{_digest(path)} {path.relative_to(folder)}" for path in sorted(folder.rglob("*")) if path.is_file()]
    return sha256("\n".join(lines).encode())


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from error


def _trigger(family: str, tensors: Mapping[str, Any], what: str) -> "Trigger":
    """A trigger from untrusted tensors, tried once on an image."""
    import torch

    from guard.triggers import KINDS

    if family not in KINDS:
        raise ZooError(f"{what} is of the unknown family {family!r}; known are {', '.join(sorted(KINDS))}")
    try:
        trigger: Trigger = KINDS[family].from_tensors(tensors)
        stamped = trigger.apply(torch.full((1, 3, 64, 64), 0.5))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise ZooError(f"{what}: these tensors make no {family} trigger: {first_line(error)}") from error
    if stamped.shape != (1, 3, 64, 64) or not bool(torch.isfinite(stamped).all()):
        raise ZooError(f"{what}: these tensors make no {family} trigger: it does not give an image")
    return trigger


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:5]) + (", …" if len(names) > 5 else "")
