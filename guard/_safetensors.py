"""Files of tensors that may be anybody's: safetensors, whose header is checked whole before anything else is read.

The library safetensors opens files by their names and maps them into memory, so that what it reads later may be another
thing than what was checked, and a file that is cut while it is mapped ends the process. Here a file is opened once, its
header is read once, and each tensor is read once from that file.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from guard._documents import open_regular, parse_json
from guard.errors import GuardError

WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one number, by safetensors' names of types."""
MAX_BYTES = 2**40
"""Largest file that is opened; only a header is read before its tensors are compared with what a model needs."""
_MAX_HEADER_BYTES = 100_000_000
_LENGTH = 8
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: Type of the numbers, by safetensors' name.
        shape: Length along each dimension.
        start: Where it begins, in bytes from the start of the file.
        size: Its length in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """A safetensors file that is open, and whose header fits it.

    Args:
        path: Name of the file, for errors.
        file: The open file.
        entries: Its tensors, by name.
        error: Class of the errors.
    """

    def __init__(self, path: Path, file: BinaryIO, entries: Mapping[str, Entry], error: type[GuardError]) -> None:
        self.path = path
        self.entries = entries
        self._file = file
        self._error = error

    def read(self, name: str) -> bytearray:
        """The bytes of one tensor.

        Raises:
            GuardError: The file was cut after its header was read.
        """
        entry = self.entries[name]
        data = bytearray(entry.size)
        view, done = memoryview(data), 0
        while done < entry.size:
            count = os.preadv(self._file.fileno(), [view[done : done + 2**30]], entry.start + done)
            if not count:
                raise self._error(f"cannot read {self.path}: it changed while it was read")
            done += count
        return data


@contextmanager
def open_tensors(path: Path, error: type[GuardError], *, wanted: str = "model.safetensors") -> Iterator[TensorFile]:
    """Open a safetensors file and check its header.

    A file is judged by its contents alone: neither its name nor its first bytes say what it is. The first eight bytes
    of safetensors are a number, which may be anything that a pickle begins with; a file whose number and header fit is
    safetensors, and a file is only looked at as a pickle when they do not.

    Args:
        path: The file.
        error: Class of the errors.
        wanted: File name that the error message suggests for a converted pickle.

    Raises:
        GuardError: The file is missing, not readable, a pickle, truncated, or not safetensors.
    """
    with open_regular(path, MAX_BYTES, error) as (file, size):
        start = file.read(_LENGTH)
        try:
            entries = parse_header(_read_header(file, start, size), size)
        except ValueError as cause:
            if is_pickle(start):
                raise error(
                    f"{path} is a pickle, which can run code when it is loaded; convert it on a machine that you can "
                    f"throw away: safetensors.torch.save_file(torch.load(FILE, weights_only=True), '{wanted}')"
                ) from cause
            raise error(f"{path} is not a safetensors file, or it is damaged: {cause}") from cause
        yield TensorFile(path, file, entries, error)


def _read_header(file: BinaryIO, start: bytes, size: int) -> bytes:
    length = int.from_bytes(start, "little") if len(start) == _LENGTH else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - _LENGTH):
        raise ValueError(f"it has {size} bytes and no header within them; it may be truncated")
    return file.read(length)


def is_pickle(start: bytes) -> bool:
    """Whether a file that is no safetensors begins as torch's pickles do, in a zip archive or bare."""
    return start[:2] == b"PK" or start[:1] == b"\x80"


def parse_header(header: bytes, size: int) -> dict[str, Entry]:
    """The tensors that a header lists, by name.

    Args:
        header: The header: the bytes behind the first eight.
        size: Size of the whole file, in bytes.

    Raises:
        ValueError: The header is not JSON of this form, or does not describe every byte of the file exactly once.
    """
    try:
        document = parse_json(header.decode())
    except UnicodeDecodeError as cause:
        raise ValueError("its header is not valid UTF-8") from cause
    if not isinstance(document, dict):
        raise ValueError("its header is not an object")  # noqa: TRY004 - it is the file that is wrong
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not texts")
    begin = _LENGTH + len(header)
    entries = {name: _entry(name, form, begin) for name, form in document.items()}
    ends = [begin, *sorted(entry.start + entry.size for entry in entries.values()), size]
    starts = [*sorted(entry.start for entry in entries.values()), size]
    if ends[:-1] != starts:  # each byte is then in one tensor: where one ends, the next begins
        raise ValueError(
            f"it has {size} bytes, and its tensors end at {ends[-2]}; it is truncated, or has bytes that belong to no "
            "tensor or to two"
        )
    return entries


def _entry(name: str, form: object, begin: int) -> Entry:
    if not isinstance(form, dict) or form.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} needs dtype, shape and data_offsets")
    dtype, shape, offsets = form["dtype"], form["shape"], form["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"{name[:80]!r} has the unknown type {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} has a shape or offsets that are not sizes")
    size = offsets[1] - offsets[0]
    if prod(shape) * WIDTHS[dtype] != size:
        raise ValueError(f"{name[:80]!r} of shape {shape} does not take {size} bytes")
    return Entry(dtype, tuple(shape), begin + offsets[0], size)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_BYTES for value in values)
