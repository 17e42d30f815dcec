"""The state of an `AxisMonitor` on disk, so that a restart forgets neither the traffic nor the axes."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors.numpy import save as save_tensors

from guard._documents import parse_json, validated
from guard._files import replace_file
from guard._safetensors import TensorFile, open_tensors
from guard.errors import StateError
from guard.screening.axis import MAX_AXES, MAX_ROWS, OTHERS, WINDOW, Axis, AxisMonitor, AxisReference

_FORMAT = 1
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
_SLACK = 1 + 1e-6
_MOST = 1e30
"""More capital than any run length allows."""
_MAX_DOCUMENT = 2**22
_UNIT = 1e-3
"""How far the length of a stored unit vector may be from 1."""

_Number = Annotated[int, Field(ge=0, le=2**53)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class StoredAxis:
    """An axis, without its direction; see `Axis`."""

    name: Annotated[str, Field(pattern=r"^axis-[0-9]{1,6}$")]
    target: _Number
    observed: _Number
    after: Annotated[int, Field(ge=1, le=2**53)]
    share: _Share
    bound: _Share
    within: _Share

    @classmethod
    def of(cls, axis: Axis) -> "StoredAxis":
        """The figures of an axis."""
        return cls(axis.name, axis.target, axis.observed, axis.after, axis.share, axis.bound, axis.within)

    def axis(self, offset: NDArray[np.float32]) -> Axis:
        """The axis with its direction."""
        return Axis(self.name, offset, self.target, self.observed, self.after, self.share, self.bound, self.within)


@dataclass(frozen=True)
class _Window:
    """How a window stands; its rows are in the tensor `rows`, in the order of the windows."""

    target: _Number
    count: Annotated[int, Field(ge=0, le=WINDOW)]
    seen: _Number
    since: _Number


@dataclass(frozen=True)
class _State:
    """What is not a tensor."""

    settings: dict[str, Any]
    observed: _Number
    axes: Annotated[list[StoredAxis], Field(max_length=MAX_AXES)]
    windows: list[_Window]
    events: Annotated[list[tuple[_Number, _Number]], Field(max_length=64)]


def dump(monitor: AxisMonitor) -> bytes:
    """The state of a monitor, as the contents of a file.

    A safetensors file: the tensors, and as one of them the bytes of a JSON document with everything else.
    """
    windows = list(monitor.windows.items())
    width = monitor.reference.matrix.shape[0]
    state = _State(
        _settings(monitor),
        monitor.observed,
        [StoredAxis.of(axis) for axis in monitor.axes],
        [_Window(k, window.count, window.seen, window.since) for k, window in windows],
        list(monitor.events),
    )
    tensors = {
        "document": np.frombuffer(json.dumps(asdict(state), allow_nan=False).encode(), np.uint8),
        "offsets": np.array([axis.offset for axis in monitor.axes], np.float32).reshape(-1, width),
        "rows": np.concatenate([np.empty((0, width), np.float32), *(window.filled for _, window in windows)]),
        "recent": monitor.recent,
        "recent_classes": monitor.recent_classes.astype(np.int64),
        "sums": monitor.bets.sums,
        "last": monitor.bets.last,
    }
    return bytes(save_tensors({name: np.ascontiguousarray(values) for name, values in tensors.items()}))


def write(path: Path, data: bytes) -> None:
    """Write what `dump` returned; the file is complete at every moment, and only this user can read it.

    Raises:
        UsageError: The file cannot be written.
    """
    replace_file(path, data, mode=0o600)


def restore(monitor: AxisMonitor, path: Path) -> None:
    """Go on from a stored state; candidates are chosen again from the stored requests.

    Raises:
        StateError: The file is missing or damaged, or was stored for another calibration or other settings; nothing
            was changed.
    """
    width, classes = monitor.reference.matrix.shape[0], len(monitor.reference.centres)
    with open_tensors(path, StateError) as file:
        state = _document(path, file)
        if state.settings != _settings(monitor):
            raise StateError(f"{path} was saved for another calibration or other settings")
        counts = sum(window.count for window in state.windows)
        forms: Mapping[str, tuple[tuple[int, ...], str]] = {
            "offsets": ((len(state.axes), width), "F32"),
            "rows": ((counts, width), "F32"),
            "recent": ((OTHERS, width), "F32"),
            "recent_classes": ((OTHERS,), "I64"),
            "sums": (monitor.bets.sums.shape, "F64"),
            "last": ((classes,), "I64"),
        }
        tensors = _tensors(path, file, forms)
    try:
        _check(monitor, state, tensors)
    except ValueError as error:
        raise StateError(f"{path} is damaged: {error}") from error
    monitor.observed = state.observed
    monitor.axes = _axes(state.axes, tensors["offsets"])
    capital = tensors["sums"][:, 0].sum(axis=(1, 2), keepdims=True)[:, None]
    # The run length may have been longer; what is over the limit of this one only just reaches it.
    monitor.bets.sums[:] = tensors["sums"] * np.minimum(1.0, monitor.bets.limit / np.maximum(capital, 1e-12))
    monitor.bets.last[:] = tensors["last"]
    monitor.recent[:], monitor.recent_classes[:] = tensors["recent"], tensors["recent_classes"]
    monitor.events.clear()
    monitor.events.extend(state.events)
    start = 0
    for window in state.windows:
        rows = tensors["rows"][start : start + window.count].copy()
        monitor.restore_window(window.target, rows, window.seen, window.since)
        start += window.count


def read_axes(path: Path, reference: AxisReference) -> list[Axis]:
    """The axes in a stored state.

    Args:
        path: The file.
        reference: What the traffic is compared with in the profile of the model. Other images may set the threshold.

    Raises:
        StateError: The file is missing or damaged, or was stored for another model or other banks.
    """
    with open_tensors(path, StateError) as file:
        state = _document(path, file)
        if state.settings.get("space") != _space(reference):
            raise StateError(f"{path} was saved for another model, or before the banks of the profile were made anew")
        if "offsets" not in file.entries:
            raise StateError(f"{path} is damaged: it has no tensor 'offsets'")
        found = _read(path, file, "offsets", (len(state.axes), len(reference.matrix)), "F32")
    try:
        _check_axes(state.axes, found, len(reference.centres), state.observed)
    except ValueError as error:
        raise StateError(f"{path} is damaged: {error}") from error
    return _axes(state.axes, found)


def _axes(stored: list[StoredAxis], offsets: NDArray[np.float32]) -> list[Axis]:
    return [axis.axis(offset.copy()) for axis, offset in zip(stored, offsets, strict=True)]


def _settings(monitor: AxisMonitor) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "delta": monitor.delta,
        "space": _space(monitor.reference),
        "clean": _digest(monitor.reference.clean, monitor.reference.clean_classes),
        "known": [axis.name for axis in monitor.known],
    }


def _space(reference: AxisReference) -> str:
    return _digest(reference.centres, reference.matrix, reference.bank)


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _document(path: Path, file: TensorFile) -> _State:
    entry = file.entries.get("document")
    if entry is None or entry.dtype != "U8" or entry.size > _MAX_DOCUMENT:
        raise StateError(f"{path} is damaged: it has no document that can be read")
    try:
        raw = parse_json(bytes(file.read("document")).decode())
    except (ValueError, UnicodeDecodeError) as error:
        raise StateError(f"{path} is damaged: its document is not JSON") from error
    if not isinstance(raw, dict):
        raise StateError(f"{path} is damaged: its document is not an object")
    state: _State = validated(path, _State, raw, StateError)
    if sum(window.count for window in state.windows) > MAX_ROWS + WINDOW:
        raise StateError(f"{path} is damaged: it holds more requests than are ever kept")
    return state


def _tensors(path: Path, file: TensorFile, forms: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, NDArray[Any]]:
    if set(file.entries) != {"document", *forms}:
        raise StateError(f"{path} is damaged: it has the tensors {sorted(file.entries)}")
    return {name: _read(path, file, name, *form) for name, form in forms.items()}


def _read(path: Path, file: TensorFile, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    entry = file.entries[name]
    if entry.shape != shape or entry.dtype != dtype:
        raise StateError(f"{path} is damaged: {name} has shape {entry.shape} and type {entry.dtype}, not {shape}")
    values: NDArray[Any] = np.frombuffer(file.read(name), _DTYPES[dtype]).reshape(shape)
    if not np.isfinite(values).all():
        raise StateError(f"{path} is damaged: {name} has a value that is not finite")
    return values


def _check(monitor: AxisMonitor, state: _State, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Make sure that a state can be one of this monitor.

    Raises:
        ValueError: It cannot.
    """
    classes, watched = len(monitor.reference.centres), monitor.reference.watched()
    _check_axes(state.axes, tensors["offsets"], classes, state.observed)
    targets = [window.target for window in state.windows]
    if len(set(targets)) < len(targets) or any(k >= classes or not watched[k] for k in targets):
        raise ValueError("its windows are not of different classes of the model")
    if any(window.count != min(window.seen, WINDOW) or window.seen > state.observed for window in state.windows):
        raise ValueError("its windows contradict each other")
    for name in ("rows", "recent"):
        if len(tensors[name]) and np.linalg.norm(tensors[name], axis=1).max() > 1 + _UNIT:
            raise ValueError(f"{name} has a vector that is longer than 1")
    labels = tensors["recent_classes"]
    if labels.min() < -1 or labels.max() >= classes:
        raise ValueError("recent_classes has an index that is out of range")
    sums, last = tensors["sums"], tensors["last"]
    capital, images, events = sums[:, 0], sums[:, 1], sums[:, 2]
    if last.min() < 0 or last.max() > state.observed or any(k >= classes for _, k in state.events):
        raise ValueError("it counts requests that were not seen")
    if (
        sums.min() < 0
        or capital.sum(axis=(1, 2)).max() > _MOST
        or (images > state.observed * capital * _SLACK).any()
        or (events > images * _SLACK).any()
    ):
        raise ValueError("its sums contradict each other")


def _check_axes(axes: list[StoredAxis], offsets: NDArray[np.float32], classes: int, observed: int) -> None:
    lengths = np.linalg.norm(offsets, axis=1) if len(offsets) else np.ones(0)
    if (np.abs(lengths - 1) > _UNIT).any():
        raise ValueError("the direction of an axis is not a unit vector")
    if len({axis.name for axis in axes}) < len(axes) or any(
        axis.target >= classes or not axis.after <= axis.observed <= observed or math.isnan(axis.share) for axis in axes
    ):
        raise ValueError("the figures of an axis contradict each other")
