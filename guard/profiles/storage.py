"""Profiles on disk: written whole or not at all, and believed only after every check."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from guard._files import check_replaceable, replace_directory
from guard.classifiers.digest import PARTS, ClassifierDigest, sha256
from guard.errors import ClassListError, ProfileError
from guard.profiles.profile import SCHEMA, Array, Document, Profile, Reference

DOCUMENT_FILE = "profile.json"
TRIGGERS_FILE = "triggers.safetensors"
REFERENCE_FILE = "reference.safetensors"
REPORT_FILE = "report.html"
_MAX_DOCUMENT_BYTES = 256 * 2**20
_MAX_TENSOR_BYTES = 8 * 2**30
_CLEAN, _SCORES, _STAMPED = "clean", "scores", "stamped."


def check_place(directory: Path) -> None:
    """Make sure that a profile may be written there, before the work that leads to one.

    Raises:
        UsageError: Something else lies there.
    """
    check_replaceable(directory, marker=DOCUMENT_FILE)


def write(profile: Profile, directory: Path, *, report: str) -> None:
    """Write a profile; an older one in its place is replaced at once, or kept if anything fails.

    Args:
        profile: What to write.
        directory: The profile's folder.
        report: The text of `report.html`.
    """
    files = {
        TRIGGERS_FILE: save_tensors(
            {f"{trigger}/{name}": np.asarray(values, order="C") for trigger, tensors in profile.triggers.items()
             for name, values in tensors.items()}
        )
    }  # fmt: skip
    if profile.reference is not None:
        stamped = {_STAMPED + name: bank for name, bank in profile.reference.stamped.items()}
        files[REFERENCE_FILE] = save_tensors(
            {_CLEAN: profile.reference.clean, _SCORES: profile.reference.scores, **stamped}
        )
    document = replace(profile.document, files={name: sha256(data) for name, data in files.items()})
    text = json.dumps(asdict(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replace_directory(directory, marker=DOCUMENT_FILE) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        (temporary / REPORT_FILE).write_text(report, encoding="utf-8")
        (temporary / DOCUMENT_FILE).write_text(text, encoding="utf-8")


def read(directory: Path) -> Profile:
    """Read and check a profile.

    Raises:
        ProfileError: A file is missing or damaged, tensors are missing, of a wrong shape or not finite, or the profile
            was written by a newer guard.
    """
    document = _read_document(directory / DOCUMENT_FILE)
    triggers: dict[str, dict[str, Array]] = {trigger.id: {} for trigger in document.triggers}
    for name, values in _read_tensors(directory / TRIGGERS_FILE, document).items():
        trigger, _, tensor = name.partition("/")
        if trigger not in triggers:
            raise ProfileError(f"{directory / TRIGGERS_FILE} holds a trigger {trigger!r} that {DOCUMENT_FILE} does not")
        triggers[trigger][tensor] = values
    if missing := [trigger for trigger, tensors in triggers.items() if not tensors]:
        raise ProfileError(f"{directory / TRIGGERS_FILE} lacks the trigger {missing[0]!r}")
    reference = _read_reference(directory / REFERENCE_FILE, document) if document.calibration else None
    return Profile(document, triggers, reference)


def _read_document(path: Path) -> Document:
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            raise ProfileError(f"{path} is larger than {_MAX_DOCUMENT_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(raw, ensure_ascii=False).encode()  # an escape such as \ud800 alone is no character: ValueError
        if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
            raise ProfileError(f"{path} is no profile: it has no schema")
        if raw["schema"] < SCHEMA:
            raise ProfileError(
                f"{path} was written by an older guard (schema {raw['schema']}, now {SCHEMA}); vet the model again"
            )
        if raw["schema"] > SCHEMA:
            raise ProfileError(
                f"{path} has schema {raw['schema']}, this guard reads up to {SCHEMA}; use the newer guard that wrote it"
            )
        document = TypeAdapter(Document).validate_python(raw)
    except FileNotFoundError as error:
        raise ProfileError(f"there is no profile in {path.parent}: {path.name} is missing") from error
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _ConstantError) as error:
        raise ProfileError(f"{path} is damaged: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ProfileError(f"{path} is damaged: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from error
    except (ClassListError, ValueError) as error:
        raise ProfileError(f"{path} is damaged: {error}") from error
    _check_document(document, path)
    return document


class _ConstantError(Exception):
    """JSON with NaN, Infinity, or a number as large."""


def _refuse_constant(name: str) -> float:
    raise _ConstantError(f"it holds the number {name[:32]}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text)


def _check_document(document: Document, path: Path) -> None:
    """What the types alone do not say."""
    model, classes = document.model, len(document.model.classes.names)
    if set(model.parts) != set(PARTS) or ClassifierDigest(model.parts).root != model.digest:
        raise ProfileError(f"{path} is damaged: the model's digest does not follow from its parts")
    targets = [trigger.target for trigger in document.triggers]
    targets += [check.target for check in document.vetting.checks]
    if document.vetting.verdict.target is not None:
        targets.append(document.vetting.verdict.target)
    if any(not 0 <= target < classes for target in targets):
        raise ProfileError(f"{path} is damaged: a target is not one of the {classes} classes")
    if len({trigger.id for trigger in document.triggers}) != len(document.triggers):
        raise ProfileError(f"{path} is damaged: two triggers have the same id")
    if document.calibration and document.calibration.k < 1:
        raise ProfileError(f"{path} is damaged: k = {document.calibration.k} is no neighbour")


def _read_tensors(path: Path, document: Document) -> dict[str, Array]:
    try:
        if path.stat().st_size > _MAX_TENSOR_BYTES:
            raise ProfileError(f"{path} is larger than {_MAX_TENSOR_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror}; the profile is not whole") from error
    if sha256(data) != document.files.get(path.name):
        raise ProfileError(f"{path} is damaged, or of another profile: its SHA-256 is not the one in {DOCUMENT_FILE}")
    try:
        tensors = load_tensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ProfileError(f"{path} is damaged: {error}") from error
    for name, values in tensors.items():
        if values.dtype != np.float32:
            raise ProfileError(f"{path} is damaged: {name} is {values.dtype}, not float32")
        if not np.isfinite(values).all():
            raise ProfileError(f"{path} is damaged: {name} holds a value that is not finite")
    return tensors


def _read_reference(path: Path, document: Document) -> Reference:
    tensors = _read_tensors(path, document)
    expected = {_CLEAN, _SCORES, *(_STAMPED + trigger.id for trigger in document.triggers)}
    if set(tensors) != expected:
        raise ProfileError(f"{path} is damaged: it holds {sorted(tensors)}, not {sorted(expected)}")
    scores = tensors.pop(_SCORES)
    if scores.ndim != 1:
        raise ProfileError(f"{path} is damaged: the calibration scores are not a list")
    for name, bank in tensors.items():
        if bank.ndim != 2 or bank.shape[1] != document.model.embedding:
            raise ProfileError(
                f"{path} is damaged: {name} has shape {bank.shape}, the model's embeddings {document.model.embedding}"
            )
        if not np.allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-3):
            raise ProfileError(f"{path} is damaged: {name} holds embeddings that are not normalised")
        if document.calibration and len(bank) < document.calibration.k:
            raise ProfileError(f"{path} is damaged: {name} has fewer rows than k = {document.calibration.k}")
    stamped = {name.removeprefix(_STAMPED): bank for name, bank in tensors.items() if name != _CLEAN}
    # In the order of the document, by which scores refer to triggers.
    return Reference(tensors[_CLEAN], {trigger.id: stamped[trigger.id] for trigger in document.triggers}, scores)
