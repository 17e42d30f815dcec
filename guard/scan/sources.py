"""Training sets on disk, as shards of pairs: WebDataset tar files, tables with paths of images, folders of images.

Whatever a set holds may be damaged or hostile. A damaged shard is reported by name, with what was read of it before;
a damaged pair is reported and left out. No member of a tar file is ever written to the disk, and a table cannot name
files outside its own folder.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from guard._documents import open_regular, read_bytes
from guard.classifiers.images import SUFFIXES, ImageFolder
from guard.errors import DataError, GuardError, MissingDependencyError, first_line
from guard.scan.tar import TarError, members

Kind = Literal["tar", "table", "folder"]

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest encoded image that is read."""
MAX_CAPTION = 4096
"""Characters of a caption that are kept; a text tower reads far fewer."""
_MAX_SHARD_BYTES = 2**40
_MAX_TEXT_BYTES = 2**20
_MAX_GROUP_BYTES = 4 * 2**30
"""Largest row group of a Parquet file, decompressed."""
_FOLDER_SHARD = 4096
"""Images of a folder that make one shard."""
_BATCH = 64
_TABLES = (".parquet", ".csv", ".tsv")
_CAPTION_SUFFIXES, _IMAGE_SUFFIXES = ("txt", "caption", "text", "json"), tuple(suffix[1:] for suffix in SUFFIXES)


@dataclass(frozen=True)
class Pair:
    """One image with its caption.

    Attributes:
        key: What names the pair within its shard.
        caption: The caption; empty where there is none.
        image: The encoded image.
    """

    key: str
    caption: str
    image: bytes


@dataclass(frozen=True)
class Skipped:
    """What was left out.

    Attributes:
        shard: Name of the shard.
        key: The pair; None if the rest of the shard cannot be read.
        reason: Why.
    """

    shard: str
    key: str | None
    reason: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Attributes:
        image: Path of the image, relative to the table's folder; in Parquet also the encoded image itself, or a
            structure with `bytes` (as the library `datasets` writes it).
        caption: The caption.
        key: What names the pair; without it, or where a table lacks it, the number of the row.
    """

    image: str = "image"
    caption: str = "caption"
    key: str = "key"


@dataclass(frozen=True)
class Shard:
    """A part of a training set that is read, embedded and resumed as a whole.

    Attributes:
        name: Its name in reports: the path below the set.
        kind: What it is.
        path: The file; for images of a folder, the folder.
        files: Of a folder, the images of this shard.
        columns: Of a table, its columns.
    """

    name: str
    kind: Kind
    path: Path
    files: tuple[Path, ...] = ()
    columns: Columns = Columns()

    @property
    def stamp(self) -> str:
        """A value that changes when the shard's files are replaced."""
        digest = hashlib.sha256(json.dumps([self.name, self.kind, self.columns.__dict__]).encode())
        for file in self.files or (self.path,):
            try:
                status = file.stat()
            except OSError:
                continue  # reading it says what is wrong
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def read(self) -> Iterator[Pair | Skipped]:
        """The pairs of the shard in order, and what had to be left out; never raises for what the files hold."""
        reader = {"tar": _read_tar, "table": _read_table, "folder": _read_folder}[self.kind]
        try:
            yield from reader(self)
        except (GuardError, TarError) as error:
            if isinstance(error, MissingDependencyError):
                raise
            yield Skipped(self.name, None, str(error))


def find_shards(data: Path, columns: Columns | None = None) -> tuple[Shard, ...]:
    """The shards of a training set, in sorted order.

    Args:
        data: A tar, Parquet, CSV or TSV file, or a folder of one of these kinds or of images. Images of a folder take
            their captions from `NAME.txt` beside them, and else from the name of their folder.
        columns: Columns of tables.

    Raises:
        DataError: There is nothing to read.
    """
    columns = columns or Columns()
    if not data.is_dir():
        kind = _kind(data)
        if not data.exists() or kind is None:
            what = "there is no" if not data.exists() else "guard cannot read"
            raise DataError(f"{what} training set {data}: give a .tar, .parquet, .csv or .tsv file, or a folder")
        return (Shard(data.name, kind, data, columns=columns),)
    found = sorted(path for path in _files_below(data) if _kind(path))
    for kind in ("tar", "table"):
        chosen = [path for path in found if _kind(path) == kind]
        if chosen:
            return tuple(Shard(str(path.relative_to(data)), kind, path, columns=columns) for path in chosen)  # type: ignore[arg-type]
    files = ImageFolder.scan(data).files
    parts = [files[start : start + _FOLDER_SHARD] for start in range(0, len(files), _FOLDER_SHARD)]
    return tuple(Shard(f"images {number:05}", "folder", data, part) for number, part in enumerate(parts))


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _kind(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    return "tar" if suffix == ".tar" else "table" if suffix in _TABLES else None


def _read_tar(shard: Shard) -> Iterator[Pair | Skipped]:
    """Members that share a name up to the first dot of its last part belong together, as in WebDataset."""
    with open_regular(shard.path, _MAX_SHARD_BYTES, DataError) as (file, size):
        key, fields = "", dict[str, bytes]()
        for member in members(file, size, MAX_IMAGE_BYTES):
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if folder + slash + stem != key:
                yield from _sample(shard, key, fields)
                key, fields = folder + slash + stem, {}
            suffix = suffix.lower()
            if suffix in _IMAGE_SUFFIXES or suffix in _CAPTION_SUFFIXES:
                limit = MAX_IMAGE_BYTES if suffix in _IMAGE_SUFFIXES else _MAX_TEXT_BYTES
                if member.data is None or member.size > limit:
                    yield Skipped(shard.name, _printable(member.name), f"it has {member.size} bytes, more than {limit}")
                else:
                    fields[suffix] = member.data
        yield from _sample(shard, key, fields)


def _sample(shard: Shard, key: str, fields: dict[str, bytes]) -> Iterator[Pair | Skipped]:
    image = next((fields[suffix] for suffix in _IMAGE_SUFFIXES if suffix in fields), None)
    if image is not None:
        yield Pair(_printable(key), _caption_of(fields), image)
    elif fields:
        yield Skipped(shard.name, _printable(key), "it has a caption and no image")


def _caption_of(fields: dict[str, bytes]) -> str:
    for suffix in _CAPTION_SUFFIXES[:-1]:
        if suffix in fields:
            return _caption(fields[suffix].decode("utf-8", "replace"))
    try:
        document = json.loads(fields.get("json", b"{}"))
    except (ValueError, RecursionError):
        return ""
    return _caption(document.get("caption", "")) if isinstance(document, dict) else ""


def _read_folder(shard: Shard) -> Iterator[Pair | Skipped]:
    for path in shard.files:
        key = _printable(str(path.relative_to(shard.path)))
        beside = path.with_suffix(".txt")
        try:
            if beside.is_file():
                caption = read_bytes(beside, _MAX_TEXT_BYTES, DataError).decode("utf-8", "replace")
            else:
                caption = path.parent.name if path.parent != shard.path else ""
            yield Pair(key, _caption(caption), read_bytes(path, MAX_IMAGE_BYTES, DataError))
        except GuardError as error:
            yield Skipped(shard.name, key, str(error))


def _read_table(shard: Shard) -> Iterator[Pair | Skipped]:
    rows = _parquet_rows(shard) if shard.path.suffix.lower() == ".parquet" else _csv_rows(shard)
    root = shard.path.parent.resolve()
    for number, row in enumerate(rows):
        key = _printable(str(row.get(shard.columns.key) or number))
        try:
            yield Pair(key, _caption(row.get(shard.columns.caption)), _image(row.get(shard.columns.image), root))
        except GuardError as error:
            yield Skipped(shard.name, key, str(error))


def _image(value: object, root: Path) -> bytes:
    """The encoded image that a cell holds or names.

    Raises:
        DataError: The cell names no file below the table's folder, or one that cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise DataError(f"its image has {len(value)} bytes, more than {MAX_IMAGE_BYTES}")
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise DataError("it names no image")
    try:
        path = (root / value).resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"its path cannot be followed: {first_line(error)}") from error
    if not path.is_relative_to(root):
        raise DataError("its path leads out of the folder of the table")
    return read_bytes(path, MAX_IMAGE_BYTES, DataError)


def _csv_rows(shard: Shard) -> Iterator[dict[str, Any]]:
    delimiter = "\t" if shard.path.suffix.lower() == ".tsv" else ","
    with open_regular(shard.path, _MAX_SHARD_BYTES, DataError) as (file, _):
        lines = (line.decode("utf-8", "replace").replace("\0", "") for line in _lines(file))
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            _check_columns(shard, reader.fieldnames or ())
            yield from reader
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} is damaged: {error}") from error


def _lines(file: Any) -> Iterator[bytes]:  # noqa: ANN401 - a reader of bytes
    while line := file.readline(_MAX_TEXT_BYTES):
        yield line


def _parquet_rows(shard: Shard) -> Iterator[dict[str, Any]]:
    parquet = import_parquet()
    # By the descriptor of a file that was found to be a regular one.
    with open_regular(shard.path, _MAX_SHARD_BYTES, DataError) as (file, _):
        try:
            table = parquet.ParquetFile(file)
            _check_columns(shard, table.schema_arrow.names)
            for group in range(table.num_row_groups):
                if (claimed := table.metadata.row_group(group).total_byte_size) > _MAX_GROUP_BYTES:
                    raise DataError(f"its row group {group} has {claimed} bytes, more than {_MAX_GROUP_BYTES}")
            wanted = [name for name in shard.columns.__dict__.values() if name in table.schema_arrow.names]
            for batch in table.iter_batches(_BATCH, columns=wanted):
                yield from batch.to_pylist()
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError, UnicodeDecodeError) as error:
            raise DataError(f"it is not Parquet, or it is damaged: {first_line(error)}") from error


def _check_columns(shard: Shard, names: Sequence[str]) -> None:
    if shard.columns.image not in names:
        raise DataError(
            f"it has no column {shard.columns.image!r}; name the one with the images, of {_listed(names)}, with "
            "--image-column"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_printable(str(name))[:40] for name in names[:10]) or "none"


def import_parquet() -> Any:  # noqa: ANN401 - pyarrow publishes no types
    """The reader and writer of Parquet, pyarrow.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise MissingDependencyError('scanning needs pyarrow; pip install "clip-guard[scan]"') from None


def _caption(value: object) -> str:
    return _printable(str(value or "").strip()[:MAX_CAPTION])


def _printable(text: str) -> str:
    """The text without what Parquet, JSON and terminals cannot hold or show."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
