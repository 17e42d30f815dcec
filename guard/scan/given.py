"""Embeddings that somebody computed before, brought into the form that a scan keeps them in."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard._documents import open_regular
from guard._files import file_stamp
from guard._safetensors import open_tensors
from guard._types import Floats
from guard.errors import DataError, first_line
from guard.scan.sources import import_parquet
from guard.scan.store import FORMAT, StoredShard, shard_stem

SUFFIXES = (".npy", ".safetensors", ".parquet")
_ROWS = 65_536
"""Rows of a file that make one shard."""
_MAX_BYTES = 2**42
_MAX_WIDTH = 65_536
_DAMAGED = (ValueError, EOFError, OSError, OverflowError, TypeError, SyntaxError, KeyError, NotImplementedError)
_HALF = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


@dataclass(frozen=True)
class _Block:
    """Consecutive pairs of a file; captions and keys are empty texts where it has none."""

    image: NDArray[np.floating]
    text: NDArray[np.floating] | None
    captions: list[str]
    keys: list[str]


def store_given(
    path: Path, folder: Path, progress: Callable[[str, int, int], None] = lambda *_: None
) -> tuple[StoredShard, ...]:
    """Copy a file of embeddings into shards of 65,536 pairs, unless that is done.

    Args:
        path: `.npy`: image embeddings, shape [N, D]. `.safetensors`: tensors `image` and, optionally, `text`, of
            float16, float32 or float64. `.parquet`: columns `image` and, optionally, `text` (lists of numbers),
            `caption` and `key`.
        folder: Where the shards are kept.
        progress: Called with a description, and twice the number of the shard.

    Raises:
        DataError: The file is missing or damaged, or has other contents.
        UsageError: The folder cannot be written.
    """
    reader = {".npy": _npy, ".safetensors": _safetensors, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} is no file of embeddings ({', '.join(SUFFIXES)}); give --model to embed a training set"
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    stored, start = [], 0
    for number, block in enumerate(reader(path)):
        place = StoredShard(shard_stem(folder, number, path.name))
        stamp = hashlib.sha256(f"{FORMAT} {path.name} {file_stamp(path)} {number}".encode()).hexdigest()
        count = len(block.image)
        if not place.finished(stamp):
            image = _checked(path, block.image)
            text = np.zeros_like(image) if block.text is None else _checked(path, block.text)
            if text.shape != image.shape:
                raise DataError(f"{path} has {text.shape} embeddings of captions for {image.shape} of images")
            place.write(
                path.name,
                stamp,
                image=image,
                text=text,
                keys=block.keys or [str(start + row) for row in range(count)],
                captions=block.captions or [""] * count,
                digests=[""] * count,
                skipped=[],
                seconds=0.0,
            )
        start += count
        stored.append(place)
        progress("reading embeddings", number + 1, number + 1)
    if not start:
        raise DataError(f"{path} holds no embeddings")
    return tuple(stored)


def _checked(path: Path, values: NDArray[np.floating]) -> Floats:
    if values.ndim != 2 or not 1 <= values.shape[1] <= _MAX_WIDTH or not np.issubdtype(values.dtype, np.floating):
        raise DataError(
            f"{path} contains {values.dtype} of shape {values.shape}; embeddings are floats of shape [N, D]"
        )
    converted: Floats = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(converted).all():
        raise DataError(f"{path} contains a value that is not finite")
    return converted


def _npy(path: Path) -> Iterator[_Block]:
    try:
        with open_regular(path, _MAX_BYTES, DataError):
            values = np.lib.format.open_memmap(path, mode="r")  # refuses objects, and more than the file holds
    except _DAMAGED as error:
        raise DataError(f"{path} is not a NumPy file of numbers: {first_line(error)}") from error
    for start in range(0, len(values) if values.ndim else 0, _ROWS):
        yield _Block(np.asarray(values[start : start + _ROWS]), None, [], [])


def _safetensors(path: Path) -> Iterator[_Block]:
    with open_tensors(path, DataError) as file:
        found = {}
        for name in ("image", "text"):
            entry = file.entries.get(name)
            if entry is None and name == "text":
                continue
            if entry is None or entry.dtype not in _HALF or len(entry.shape) != 2 or not entry.size:
                raise DataError(f"{path} needs a tensor 'image' of floats, shape [N, D]")
            found[name] = np.memmap(path, _HALF[entry.dtype], "r", entry.start, entry.shape)
        for start in range(0, len(found["image"]), _ROWS):
            rows = slice(start, start + _ROWS)
            yield _Block(found["image"][rows], found["text"][rows] if "text" in found else None, [], [])


def _parquet(path: Path) -> Iterator[_Block]:
    parquet = import_parquet()
    with open_regular(path, _MAX_BYTES, DataError) as (file, _):
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if "image" not in names:
                raise DataError(f"{path} needs a column 'image' with lists of numbers")
            wanted = [name for name in ("image", "text", "caption", "key") if name in names]
            for batch in table.iter_batches(_ROWS, columns=wanted):
                columns = {name: batch.column(name) for name in wanted}
                yield _Block(
                    _matrix(columns["image"]),
                    _matrix(columns["text"]) if "text" in columns else None,
                    [str(value or "") for value in columns["caption"].to_pylist()] if "caption" in columns else [],
                    [str(value) for value in columns["key"].to_pylist()] if "key" in columns else [],
                )
        except _DAMAGED as error:
            raise DataError(f"{path} is not Parquet, or it is damaged: {first_line(error)}") from error


def _matrix(column: Any) -> NDArray[np.floating]:  # noqa: ANN401 - pyarrow publishes no types
    lengths = {len(row) if row is not None else 0 for row in column}
    if len(lengths) != 1:
        raise DataError("its lists of numbers differ in length")
    return np.asarray(column.flatten(), np.float32).reshape(len(column), -1)
