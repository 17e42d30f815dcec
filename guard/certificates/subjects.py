"""The files that a certificate is about, by name: those of the model, of its export, and of its profile."""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from guard._documents import open_regular, recording
from guard.classifiers.files import CONFIG_FILE, HUGGING_FACE_FILES, OPEN_CLIP_FILES
from guard.classifiers.manifest import MANIFEST_FILE, MODEL_FILE
from guard.errors import CertificateError
from guard.profiles.storage import CONTENTS, DOCUMENT_FILE, REFERENCE_MODEL

MODEL, EXPORTED, PROFILE, REFERENCE_MODEL_PART = "model", "exported", "profile", "reference-model"
"""First parts of the names of subjects."""
MAX_FILES = 10_000
_MAX_FILE_BYTES = 2**40
_LONGEST_NAME = 1024
_EXPORTED_FILES = (MANIFEST_FILE, MODEL_FILE)


def check_name(name: str) -> None:
    """Make sure that a name stands for one file on every system.

    Raises:
        ValueError: It does not.
    """
    path = PurePosixPath(name)
    if (
        not name
        or len(name) > _LONGEST_NAME
        or path.is_absolute()
        or str(path) != name
        or {"..", "."} & set(path.parts)
        or "\\" in name
        or not name.isprintable()
        or unicodedata.normalize("NFC", name) != name
    ):
        raise ValueError(f"{name[:80]!r} is not a plain relative name of a file")


def check_names(names: Iterable[str]) -> None:
    """Make sure that names are plain, and that no two could be the same file on some system.

    Raises:
        ValueError: They are not.
    """
    seen: dict[str, str] = {}
    for name in names:
        check_name(name)
        if (folded := name.casefold()) in seen:
            raise ValueError(f"{name!r} is listed beside {seen[folded]!r}")
        seen[folded] = name


def named(opened: Mapping[Path, str], folder: Path, part: str) -> dict[str, str]:
    """The files below a folder that were opened, by the names that they have as subjects.

    Args:
        opened: SHA-256 of each file by its path (`guard._documents.recording`).
        folder: The folder.
        part: First part of the names; "" for none.
    """
    start = f"{part}/" if part else ""
    return {
        start + path.relative_to(folder).as_posix(): digest
        for path, digest in opened.items()
        if path.is_relative_to(folder)
    }


def profile_files(opened: Mapping[Path, str], profile: Path) -> dict[str, str]:
    """The files of a profile that were opened, by name of subject; its reference model is a part of its own."""
    inner = profile / REFERENCE_MODEL
    own = {path: digest for path, digest in opened.items() if not path.is_relative_to(inner)}
    return named(own, profile, PROFILE) | named(opened, inner, REFERENCE_MODEL_PART)


def files_of_profile(profile: Path) -> dict[str, str]:
    """Hash the files of a profile that a sidecar opens.

    Raises:
        CertificateError: The folder holds no profile, or a file cannot be read.
    """
    if not (profile / DOCUMENT_FILE).is_file():
        raise CertificateError(f"there is no profile in {profile}: {DOCUMENT_FILE} is missing")
    own = [name for name in CONTENTS if (profile / name).exists()]
    inner = profile / REFERENCE_MODEL
    models = [name for name in _EXPORTED_FILES if (inner / name).exists()]
    return hash_files(profile, PROFILE, own) | hash_files(inner, REFERENCE_MODEL_PART, models)


def files_of_model(model: Path, opened: Mapping[Path, str] | None = None) -> dict[str, str]:
    """The files of a model that guard would open, by name of subject.

    Args:
        model: A folder of open_clip, of a Hugging Face `CLIPModel`, or one that `guard export` wrote.
        opened: SHA-256 of files that were opened already, by path; they are not hashed again.

    Raises:
        CertificateError: The folder holds no model, or a file cannot be read or has a name that is not plain.
    """
    if not model.is_dir():
        raise CertificateError(f"{model} is not a folder of a model")
    patterns: tuple[str, ...]
    if (model / MANIFEST_FILE).is_file():
        part, patterns = EXPORTED, _EXPORTED_FILES
    elif (model / CONFIG_FILE).is_file():
        part, patterns = MODEL, OPEN_CLIP_FILES
    elif (model / "config.json").is_file():
        part, patterns = MODEL, HUGGING_FACE_FILES
    else:
        raise CertificateError(f"{model} holds no model that guard can load")
    known = opened or {}
    names = sorted(path.name for path in model.iterdir() if opens(path.name, patterns) and path not in known)
    return hash_files(model, part, names) | named(known, model, part)


def files_of_loaded(source: str, opened: Mapping[Path, str]) -> dict[str, str]:
    """The files of a model that was loaded: those that were opened, and the others of its folder that guard would open.

    Args:
        source: The model, as `guard.load` takes it; beside a single file of weights nothing else counts.
        opened: SHA-256 of the files that were opened to load it; at least one.

    Raises:
        CertificateError: A file beside them cannot be read or has a name that is not plain.
    """
    folder = Path(os.path.commonpath([path.parent for path in opened]))
    return named(opened, folder, MODEL) if "::" in source else files_of_model(folder, opened)


def opens(name: str, patterns: Iterable[str]) -> bool:
    """Whether guard would open a file of this name in a folder of a model, on a system that ignores case too."""
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)


def hash_files(folder: Path, part: str, names: Iterable[str]) -> dict[str, str]:
    """Hash files of a folder, each by one descriptor.

    Raises:
        CertificateError: One cannot be read, or has a name that is not plain.
    """
    with recording() as opened:
        for name in names:
            try:
                check_name(name)
            except ValueError as error:
                raise CertificateError(f"{folder}: {error}") from error
            with open_regular(folder / name, _MAX_FILE_BYTES, CertificateError):
                pass
    return named(opened, folder, part)
