"""Profiles on disk: written completely or not at all, and used only after every check has passed."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from guard._documents import open_regular, read_bytes, read_object, validated
from guard._files import check_replaceable, replace_directory
from guard._safetensors import parse_header
from guard._types import Floats
from guard.classifiers.digest import PARTS, ClassifierDigest, sha256
from guard.classifiers.manifest import MANIFEST_FILE, MODEL_FILE, read_manifest
from guard.errors import ProfileError, UsageError
from guard.profiles.document import SCHEMA, CalibrationRecord, Document, Reference, TriggerTensors
from guard.screening import (
    Axis,
    AxisReference,
    Banks,
    Scores,
    Screen,
    SecondOpinion,
    Whitening,
    check_alpha,
    score_names,
)
from guard.triggers import FORMS, check_tensors

if TYPE_CHECKING:
    from guard.classifiers import ExportedClassifier

DOCUMENT_FILE = "profile.json"
TRIGGERS_FILE = "triggers.safetensors"
REFERENCE_FILE = "reference.safetensors"
AXIS_FILE = "axis.safetensors"
CONTENTS = (DOCUMENT_FILE, TRIGGERS_FILE, REFERENCE_FILE, AXIS_FILE)
"""The files of a profile that are read, besides its reference model."""
REFERENCE_MODEL = "reference-model"
"""Name of the folder of the exported reference model in the folder of a profile."""
REPORT_FILE = "report.html"
"""Name of the report in the folder of a profile."""
_MAX_DOCUMENT_BYTES = 256 * 2**20
_MAX_TENSOR_BYTES = 8 * 2**30
_MAX_TOKENS = 64
"""Most tokens of a trigger of a text tower."""
_MAX_HEADER_BYTES = 16 * 2**20
_STAMPED, _OPINION = "stamped.", "opinion."
_MODEL_FILES = (MANIFEST_FILE, MODEL_FILE)
_MAX_MODEL_BYTES = 2**31
_WHITENING, _BANK, _CLEAN = ("mean", "matrix", "head"), "reference", ("values", "parts", "triggers", "classes")
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}

OLDEST_SCHEMA = 3
"""The oldest schema that is still read: that of release 0.1.0. Schema 4, of release 0.2.0, is this one without a second
opinion."""
_NEW_NAMES = {
    "control": "reference_model",
    "control_success": "reference_success",
    "evidence": "results",
    "self_control": "derived_reference",
}
"""Names in schema 3 → names in this schema."""


def check_place(directory: Path) -> None:
    """Make sure that a profile can be written to a directory; this saves work whose result could not be stored.

    Raises:
        UsageError: Something other than a profile is in the directory.
    """
    check_replaceable(directory, marker=DOCUMENT_FILE)


def write(
    directory: Path,
    document: Document,
    triggers: TriggerTensors,
    reference: Reference | None,
    reference_model: Path | None,
    report: str | None,
) -> None:
    """Write the contents of a profile (`Profile.save`)."""
    files = {
        TRIGGERS_FILE: save_tensors(
            {f"{trigger}/{name}": np.asarray(values, order="C") for trigger, tensors in triggers.items()
             for name, values in tensors.items()}
        )
    }  # fmt: skip
    if reference is not None:
        files[REFERENCE_FILE] = save_tensors(_reference_tensors(reference))
        if reference.axis is not None:
            files[AXIS_FILE] = save_tensors(_axis_tensors(reference.axis, reference.axes))
    digests = {name: sha256(data) for name, data in files.items()}
    if reference_model is not None:
        check_reference_model(document, reference_model)
        digests |= {f"{REFERENCE_MODEL}/{name}": _file_digest(reference_model / name) for name in _MODEL_FILES}
    document = replace(document, files=digests)
    text = json.dumps(asdict(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replace_directory(directory, marker=DOCUMENT_FILE) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        if reference_model is not None:
            (temporary / REFERENCE_MODEL).mkdir()
            for name in _MODEL_FILES:
                shutil.copyfile(reference_model / name, temporary / REFERENCE_MODEL / name)
                if _file_digest(temporary / REFERENCE_MODEL / name) != digests[f"{REFERENCE_MODEL}/{name}"]:
                    raise ProfileError(f"{reference_model / name} changed while it was copied; try again")
        if report is not None:
            (temporary / REPORT_FILE).write_text(report, encoding="utf-8")
        (temporary / DOCUMENT_FILE).write_text(text, encoding="utf-8")


def _file_digest(path: Path) -> str:
    return sha256(read_bytes(path, _MAX_MODEL_BYTES, ProfileError))


def check_reference_model(document: Document, directory: Path) -> None:
    """Make sure that an export is that of the reference model that a profile was calibrated with.

    Raises:
        ProfileError: The profile has no second opinion, or one of another model.
        ModelError: The export is missing or damaged.
    """
    record = None if document.calibration is None else document.calibration.second_opinion
    if record is None:
        raise ProfileError("the profile was calibrated without a reference model")
    manifest = read_manifest(directory / MANIFEST_FILE)
    if manifest.classifier != record.digest:
        raise ProfileError(f"{directory} is the export of another model than the reference model of the profile")


def load_reference_model(
    document: Document, directory: Path, *, threads: int = 0, loaded: "ExportedClassifier | None" = None
) -> "ExportedClassifier":
    """Load the reference model of a profile, after a check that its files are those that the profile names.

    Args:
        document: The contents of `profile.json`.
        directory: Folder of the exported reference model.
        threads: Threads that one forward pass uses, see `ExportedClassifier`.
        loaded: A model that is loaded already, which is taken if the manifest of the reference model is its own.

    Raises:
        ProfileError: The reference model is another one than that of the profile, or does not fit it.
        ModelError: A file is missing or damaged.
    """
    check_reference_model(document, directory)
    digest = document.files.get(f"{REFERENCE_MODEL}/{MANIFEST_FILE}")
    if digest is not None and _file_digest(directory / MANIFEST_FILE) != digest:
        raise ProfileError(f"{directory / MANIFEST_FILE} is damaged: its SHA-256 is not the one in {DOCUMENT_FILE}")
    if loaded is not None and loaded.manifest == read_manifest(directory / MANIFEST_FILE):
        model = loaded
    else:
        from guard.classifiers import ExportedClassifier

        model = ExportedClassifier(directory, threads=threads)
    record = document.calibration.second_opinion if document.calibration else None
    if model.classes.names != document.model.classes.names or (
        record is not None and model.manifest.embedding != record.embedding
    ):
        raise ProfileError(f"{directory} has other classes or another embedding than the profile says")
    if (model.text is None) != (document.inputs == "images"):
        raise ProfileError(f"{directory} is of another tower than the {document.inputs} that the profile screens need")
    if model.text is None and model.preprocessing.size != document.model.preprocessing.size:
        raise ProfileError(f"{directory} takes images of another size than the model of the profile")
    return model


def read(directory: Path) -> tuple[Document, TriggerTensors, Reference | None, Path | None]:
    """Read and check the contents of a profile (`Profile.open`)."""
    document = _read_document(directory / DOCUMENT_FILE)
    triggers: dict[str, dict[str, Floats]] = {trigger.id: {} for trigger in document.triggers}
    for name, values in _read_tensors(directory / TRIGGERS_FILE, document).items():
        trigger, _, tensor = name.partition("/")
        if trigger not in triggers:
            raise ProfileError(
                f"{directory / TRIGGERS_FILE} has a trigger {trigger!r} that {DOCUMENT_FILE} does not name"
            )
        triggers[trigger][tensor] = values
    if missing := [trigger for trigger, tensors in triggers.items() if not tensors]:
        raise ProfileError(f"{directory / TRIGGERS_FILE} lacks the trigger {missing[0]!r}")
    for record in document.triggers:
        if record.family in FORMS:  # the form of a newer guard's family is not known here
            try:
                check_tensors(record.family, triggers[record.id])
            except ValueError as error:
                raise ProfileError(
                    f"{directory / TRIGGERS_FILE} is damaged: {record.id!r} is not a {record.family} trigger: {error}"
                ) from error
    calibration = document.calibration
    reference = _read_reference(directory / REFERENCE_FILE, document, calibration) if calibration else None
    if reference is not None and AXIS_FILE in document.files:
        reference = _with_axes(directory / AXIS_FILE, document, reference)
    elif document.axes:
        raise ProfileError(f"{directory / DOCUMENT_FILE} is damaged: it names axes, and no {AXIS_FILE}")
    held = any(name.startswith(f"{REFERENCE_MODEL}/") for name in document.files)
    return document, triggers, reference, directory / REFERENCE_MODEL if held else None


def _read_document(path: Path) -> Document:
    missing = f"there is no profile in {path.parent}: {path.name} is missing"
    raw = read_object(path, _MAX_DOCUMENT_BYTES, ProfileError, missing=missing)
    if not isinstance(schema := raw.get("schema"), int):
        raise ProfileError(f"{path} is not a profile: it has no schema")
    if schema < OLDEST_SCHEMA:
        raise ProfileError(f"{path} was written by an older guard (schema {schema}, now {SCHEMA}); vet the model again")
    if schema > SCHEMA:
        raise ProfileError(
            f"{path} has schema {schema}, this guard reads up to {SCHEMA}; use the newer guard that wrote it"
        )
    document = validated(path, Document, _from_schema_3(raw, path) if schema == 3 else raw, ProfileError)
    _check_document(document, path)
    return replace(document, schema=SCHEMA)


def _from_schema_3(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same document in schema 4, which has other names for results and reference model."""

    def renamed(item: dict[str, Any]) -> dict[str, Any]:
        return {
            _NEW_NAMES.get(key, key): "derived" if key in {"control", "kind"} and value == "self" else value
            for key, value in item.items()
        }

    try:
        vetting = renamed(raw["vetting"])
        vetting["reference_model"] = renamed(vetting["reference_model"])
        vetting["effort"] = renamed(vetting["effort"])
        for part in ("results", "checks"):
            vetting[part] = [renamed(item) for item in vetting[part]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ProfileError(f"{path} is damaged: its part 'vetting' is not that of schema {OLDEST_SCHEMA}") from error
    return {**raw, "vetting": vetting}


def _check_document(document: Document, path: Path) -> None:
    """Check what the types alone do not ensure.

    Raises:
        ProfileError: Parts of the document contradict each other.
    """
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
    names = [axis.name for axis in document.axes]
    if len(set(names)) < len(names) or set(names) & {trigger.id for trigger in document.triggers}:
        raise ProfileError(f"{path} is damaged: two axes have the same name")
    if any(not 0 <= axis.target < classes for axis in document.axes):
        raise ProfileError(f"{path} is damaged: the target of an axis is not one of the {classes} classes")
    _check_text(document, path)
    calibration = document.calibration
    if calibration and calibration.k < 1:
        raise ProfileError(f"{path} is damaged: k = {calibration.k} is not positive")
    if calibration and any(not (tail.scale > 0 and 0 < tail.weight <= 1) for tail in calibration.tails.values()):
        raise ProfileError(
            f"{path} is damaged: the tail of a score has a scale that is not positive, or a weight outside (0, 1]"
        )
    opinion = calibration.second_opinion if calibration else None
    if opinion and not (opinion.scale > 0 and opinion.embedding > 0 and 0 <= opinion.agreement <= 1):
        raise ProfileError(f"{path} is damaged: a figure of the second opinion is out of range")


def _check_text(document: Document, path: Path) -> None:
    """Check what was found in the text tower, as `_check_document` does.

    Raises:
        ProfileError: Its parts contradict each other, or are out of range.
    """
    if document.text is None:
        return
    trigger, classes = document.text.trigger, len(document.model.classes.names)
    numbers = [*trigger.feature, *(value for vector in trigger.vectors for value in vector)]
    if (
        len(trigger.feature) != document.model.embedding
        or len(trigger.vectors) > _MAX_TOKENS
        or len({len(vector) for vector in trigger.vectors}) > 1
        or not 0 <= trigger.target < classes
        or not np.isfinite(numbers).all()
    ):
        raise ProfileError(f"{path} is damaged: the trigger of its text tower cannot be one")


def _reference_tensors(reference: Reference) -> dict[str, NDArray[Any]]:
    banks, clean = reference.banks, reference.clean
    tensors = {
        "mean": banks.whitening.mean,
        "matrix": banks.whitening.matrix,
        "head": banks.head,
        _BANK: banks.reference,
        **{_STAMPED + name: bank for name, bank in banks.stamped.items()},
        "values": clean.values,
        "parts": np.stack([clean.parts[name] for name in banks.tails]),
        "triggers": clean.triggers,
        "classes": clean.classes,
    }
    if (opinion := banks.opinion) is not None:
        tensors |= {_OPINION + name: getattr(opinion, name) for name in _opinion_forms(0, 0)}
    return {name: np.ascontiguousarray(values) for name, values in tensors.items()}


def _axis_tensors(axis: AxisReference, axes: tuple[Axis, ...]) -> dict[str, NDArray[Any]]:
    # The classes of the clean images are those of their scores.
    tensors = {name: getattr(axis, name) for name in ("centres", "matrix", "bank", "bank_classes", "clean")}
    tensors["offsets"] = np.array([each.offset for each in axes], np.float32).reshape(len(axes), len(axis.matrix))
    return {name: np.ascontiguousarray(values) for name, values in tensors.items()}


def _with_axes(path: Path, document: Document, reference: Reference) -> Reference:
    """The reference with what the traffic is compared with, and with the adopted axes."""
    tensors = _views(path, _contents(path, document))
    width, classes = document.model.embedding, len(document.model.classes.names)
    size = len(tensors["bank"]) if "bank" in tensors and tensors["bank"].ndim else 0
    floats, integers = np.dtype(np.float32), np.dtype(np.int64)
    forms = {
        "centres": ((classes, width), floats),
        "matrix": ((width, width), floats),
        "bank": ((size, width), floats),
        "bank_classes": ((size,), integers),
        "clean": ((len(reference.clean.values), width), floats),
        "offsets": ((len(document.axes), width), floats),
    }
    if set(tensors) != set(forms):
        raise ProfileError(f"{path} is damaged: it has the tensors {sorted(tensors)}, not {sorted(forms)}")
    for name, (shape, dtype) in forms.items():
        if tensors[name].shape != shape or tensors[name].dtype != dtype:
            raise ProfileError(f"{path} is damaged: {name} has shape {tensors[name].shape}, not {shape}")
        if dtype == floats and not np.isfinite(tensors[name]).all():
            raise ProfileError(f"{path} is damaged: {name} has a value that is not finite")
    labels = tensors["bank_classes"]
    if size == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ProfileError(f"{path} is damaged: bank_classes has an index that is out of range")
    if not np.linalg.norm(tensors["offsets"], axis=1).all():
        raise ProfileError(f"{path} is damaged: an axis has no direction")
    axis = AxisReference(
        tensors["centres"], tensors["matrix"], tensors["bank"], labels, tensors["clean"], reference.clean.classes
    )
    axes = tuple(
        Axis(item.name, offset, item.target, item.observed, item.after, item.share, item.bound, item.within)
        for item, offset in zip(document.axes, tensors["offsets"], strict=True)
    )
    return replace(reference, axis=axis, axes=axes)


def _opinion_forms(reference: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a second opinion, for the lengths of the embeddings of both models."""
    return {
        "centre": (reference,),
        "offset": (width,),
        "matrix": (reference, width),
        "whitening": (width, width),
    }


def _contents(path: Path, document: Document) -> NDArray[np.uint8]:
    """The bytes of a file, after a check that it is the one that the document names.

    The file is read into memory, so that what was checked is what is used, whatever happens to the file later.
    """
    missing = f"cannot read {path}: there is no such file; the profile is incomplete"
    with open_regular(path, _MAX_TENSOR_BYTES, ProfileError, missing=missing) as (file, size):
        data = np.empty(size, np.uint8)
        if file.readinto(data.data) != size:
            raise ProfileError(f"cannot read {path}: it changed while it was read")
    data.flags.writeable = False
    if hashlib.sha256(data.data).hexdigest() != document.files.get(path.name):
        raise ProfileError(f"{path} is damaged, or of another profile: its SHA-256 is not the one in {DOCUMENT_FILE}")
    return data


def _views(path: Path, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, as views that copy nothing."""
    try:
        return dict(_tensors(data))
    except ValueError as error:
        raise ProfileError(f"{path} is damaged: {error}") from error


def _tensors(data: NDArray[np.uint8]) -> Iterator[tuple[str, NDArray[Any]]]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 + length or length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes")
    for name, entry in parse_header(data[8 : 8 + length].tobytes(), len(data)).items():
        if entry.dtype not in _DTYPES:
            raise ValueError(f"{name} is {entry.dtype}, not one of {', '.join(_DTYPES)}")
        yield name, data[entry.start : entry.start + entry.size].view(_DTYPES[entry.dtype]).reshape(entry.shape)


def _read_tensors(path: Path, document: Document) -> dict[str, Floats]:
    tensors = {}
    for name, values in _views(path, _contents(path, document)).items():
        if values.dtype != np.float32:
            raise ProfileError(f"{path} is damaged: {name} is {values.dtype}, not float32")
        if not np.isfinite(values).all():
            raise ProfileError(f"{path} is damaged: {name} has a value that is not finite")
        tensors[name] = np.array(values)
    return tensors


def _read_reference(path: Path, document: Document, calibration: CalibrationRecord) -> Reference:
    tensors = _views(path, _contents(path, document))
    triggers = [trigger.id for trigger in document.compared(calibration.inputs)]
    record = calibration.second_opinion
    opinions = {} if record is None else _opinion_forms(record.embedding, document.model.embedding)
    expected = {*_WHITENING, _BANK, *_CLEAN, *(_STAMPED + name for name in triggers)}
    expected |= {_OPINION + name for name in opinions}
    if set(tensors) != expected:
        raise ProfileError(f"{path} is damaged: it has the tensors {sorted(tensors)}, not {sorted(expected)}")
    scores = score_names(triggers, opinion=record is not None)
    if set(calibration.tails) != set(scores):
        raise ProfileError(
            f"{path} is damaged: there are tails of {sorted(calibration.tails)}, not of {sorted(scores)}"
        )
    size, width = tensors[_BANK].shape[0] if tensors[_BANK].ndim else 0, document.model.embedding
    count, classes = len(tensors["values"]) if tensors["values"].ndim else 0, len(document.model.classes.names)
    floats, integers = np.dtype(np.float32), np.dtype(np.int64)
    forms = {
        "mean": ((width,), floats),
        "matrix": ((width, width), floats),
        "head": ((width, classes), floats),
        _BANK: ((size, width), floats),
        **{_STAMPED + name: ((size, width), floats) for name in triggers},
        **{_OPINION + name: (shape, floats) for name, shape in opinions.items()},
        "values": ((count,), floats),
        "parts": ((len(scores), count), floats),
        "triggers": ((count,), integers),
        "classes": ((count,), integers),
    }
    for name, (shape, dtype) in forms.items():
        if tensors[name].shape != shape or tensors[name].dtype != dtype:
            raise ProfileError(
                f"{path} is damaged: {name} has shape {tensors[name].shape} and type {tensors[name].dtype}, "
                f"not {shape} and {dtype}"
            )
    if size <= calibration.k or count != calibration.threshold.size:
        raise ProfileError(
            f"{path} is damaged: {size} images in the banks and {count} scores do not fit {DOCUMENT_FILE}"
        )
    # `Screen` checks the banks.
    for name in (*_WHITENING, "values", "parts", *(_OPINION + name for name in opinions)):
        if not np.isfinite(tensors[name]).all():
            raise ProfileError(f"{path} is damaged: {name} has a value that is not finite")
    for name, least, most in (("classes", 0, classes), ("triggers", -1, len(triggers))):
        if count and not least <= tensors[name].min() <= tensors[name].max() < most:
            raise ProfileError(f"{path} is damaged: {name} has an index that is out of range")
    banks = Banks(
        Whitening(tensors["mean"], tensors["matrix"], calibration.shrinkage),
        tensors["head"],
        tensors[_BANK],
        {name: tensors[_STAMPED + name] for name in triggers},  # in the order by which scores refer to triggers
        calibration.k,
        calibration.tails,
        None
        if record is None
        else SecondOpinion(record.scale, tensors["head"], *(tensors[_OPINION + name] for name in opinions)),
        None if record is None else record.near,
    )
    try:
        Screen(banks)
        check_alpha(calibration.threshold.alpha, count)
    except (ValueError, UsageError) as error:
        raise ProfileError(f"{path} is damaged: {error}") from error
    parts = dict(zip(calibration.tails, tensors["parts"], strict=True))
    return Reference(banks, Scores(tensors["values"], parts, tensors["triggers"], tensors["classes"]))
