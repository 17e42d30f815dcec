"""What a scan keeps on disk: embeddings and captions of each shard, so that a scan that was killed continues.

A shard is kept as two files. `NAME.parquet` has one row for each pair: key, caption, and the SHA-256 of the image.
`NAME.safetensors` has the embeddings, and is written last: where it is, the shard is finished. It holds the stamp of
what it was made from, and is made again when that changes.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from guard._documents import read_bytes, read_document
from guard._files import replace_file
from guard._safetensors import open_tensors
from guard._types import Floats
from guard.errors import DataError, GuardError, first_line
from guard.scan.sources import Skipped, import_parquet

FORMAT = "guard scan 1"
_MAX_TABLE = 2**36
_MAX_NOTE = 2**30


@dataclass(frozen=True)
class _Note:
    """What is known of a finished shard.

    Attributes:
        name: Name of the shard.
        stamp: Digest of what it was made from.
        pairs: Number of pairs.
        skipped: What was left out.
        seconds: Time that embedding took.
    """

    name: str
    stamp: str
    pairs: int
    skipped: tuple[Skipped, ...]
    seconds: float


class StoredShard:
    """The embeddings of one shard on disk, read in slices.

    Args:
        stem: Path of its files without their suffix.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self._tensors, self._table = stem.with_suffix(".safetensors"), stem.with_suffix(".parquet")
        self._note = stem.with_suffix(".json")

    def finished(self, stamp: str) -> bool:
        """Whether the shard was embedded from exactly this."""
        try:
            return self.note.stamp == stamp and self.image.shape[0] == self.note.pairs and self._table.is_file()
        except GuardError:
            return False

    @cached_property
    def note(self) -> _Note:
        """What is known of the shard."""
        return read_document(self._note, _Note, _MAX_NOTE, DataError)

    @cached_property
    def image(self) -> np.memmap[Any, np.dtype[np.float32]]:
        """Image embeddings as the tower gives them, shape [N, D]."""
        return self._mapped("image")

    @cached_property
    def text(self) -> np.memmap[Any, np.dtype[np.float32]]:
        """Embeddings of the captions, shape [N, D]."""
        return self._mapped("text")

    def _mapped(self, name: str) -> np.memmap[Any, np.dtype[np.float32]]:
        with open_tensors(self._tensors, DataError) as file:
            entry = file.entries.get(name)
            if entry is None or entry.dtype != "F32" or len(entry.shape) != 2 or not entry.size:
                raise DataError(f"{self._tensors} is damaged: it has no embeddings {name}; delete it")
            return np.memmap(self._tensors, np.float32, "r", entry.start, entry.shape)

    def column(self, name: str) -> list[str]:
        """`key`, `caption` or `digest` of every pair.

        Raises:
            DataError: The table is damaged.
        """
        parquet = import_parquet()
        try:
            table = parquet.read_table(io.BytesIO(read_bytes(self._table, _MAX_TABLE, DataError)), columns=[name])
            values: list[str] = table.column(name).to_pylist()
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self._table} is damaged, delete it: {first_line(error)}") from error
        if len(values) != self.note.pairs:
            raise DataError(f"{self._table} is damaged: it has {len(values)} rows for {self.note.pairs} pairs")
        return values

    def write(
        self,
        name: str,
        stamp: str,
        *,
        image: Floats,
        text: Floats,
        keys: Sequence[str],
        captions: Sequence[str],
        digests: Sequence[str],
        skipped: Sequence[Skipped],
        seconds: float,
    ) -> None:
        """Write the shard; the note comes last.

        Raises:
            UsageError: It cannot be written.
        """
        parquet = import_parquet()
        import pyarrow as pa

        self._note.unlink(missing_ok=True)
        table = pa.table({"key": list(keys), "caption": list(captions), "digest": list(digests)})
        buffer = io.BytesIO()
        parquet.write_table(table, buffer, compression="zstd")
        replace_file(self._table, buffer.getvalue())
        replace_file(self._tensors, save({"image": image, "text": text}))
        note = _Note(name, stamp, len(keys), tuple(skipped), round(seconds, 3))
        replace_file(self._note, json.dumps(asdict(note), indent=1).encode())
        for name in ("note", "image", "text"):
            self.__dict__.pop(name, None)


def shard_stem(folder: Path, number: int, name: str) -> Path:
    """Where a shard is kept: its number, and what of its name can be part of a file's name."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
    return folder / f"{number:06}-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
