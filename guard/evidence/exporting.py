"""Export records to a file for other programs."""

import csv
import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any

from guard._files import replacing
from guard.errors import MissingDependencyError, UsageError
from guard.evidence.records import COLUMNS, NUMBERS, Record

_CHUNK = 1000
_FORMULA = re.compile(r"""(^|[;,\t|])([\s"]*)(?=[=+\-@＝＋－＠])""")
"""Where a formula may begin: at the start of a text, and behind what some spreadsheet takes for the end of a cell.

Which that is depends on its settings: with `;`, a text `a;=1` becomes two cells. The full-width signs are accepted too.
"""


def export(
    records: Iterable[Record], path: Path, *, document: Callable[[Record], dict[str, Any]] = Record.document
) -> int:
    """Write records, without their thumbnails, to a file that appears when it is complete.

    The suffix decides the format: `.csv`, `.jsonl` (an object on each line) or `.parquet`. All three contain the fields
    of `Record` under their names, `id` first. In CSV, scores and thresholds are JSON, and an apostrophe stands before
    whatever a spreadsheet would take for a formula, because request ids come from clients.

    Args:
        records: The records to write; only a few are in memory at a time.
        path: The file to write; its mode is 0600, like that of the log.
        document: Makes the object of a line of `.jsonl`, such as `detection_finding`; other formats ignore it.

    Returns:
        The number of records written.

    Raises:
        UsageError: The suffix is none of these, or the file cannot be written.
        MissingDependencyError: pyarrow, which Parquet needs, is not installed.
    """
    writers: dict[str, Callable[[Iterable[Record], IO[bytes]], int]] = {
        ".csv": _csv, ".jsonl": partial(_jsonl, document=document), ".parquet": _parquet
    }  # fmt: skip
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise UsageError(f"the export {path} must end in one of {', '.join(writers)}")
    with replacing(path, mode=0o600) as file:
        return writer(records, file)


def _csv(records: Iterable[Record], file: IO[bytes]) -> int:
    text = TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer, count = csv.writer(text), 0
    writer.writerow(COLUMNS)
    for record in records:
        row = record.document()
        for name in ("scores", "thresholds"):
            row[name] = json.dumps(row[name], ensure_ascii=False)
        writer.writerow([_harmless(value) if isinstance(value, str) else value for value in row.values()])
        count += 1
    text.detach()
    return count


def _harmless(text: str) -> str:
    """A text in which no cell begins with a formula, however it is divided: an apostrophe stands before each."""
    return _FORMULA.sub(lambda found: f"{found[1]}'{found[2]}", text)


def _jsonl(records: Iterable[Record], file: IO[bytes], *, document: Callable[[Record], dict[str, Any]]) -> int:
    count = 0
    for record in records:
        file.write(json.dumps(document(record), ensure_ascii=False).encode() + b"\n")
        count += 1
    return count


def _parquet(records: Iterable[Record], file: IO[bytes]) -> int:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "an export to Parquet needs pyarrow; install it with: pip install 'clip-guard[parquet]'"
        ) from error
    special = {
        "id": pa.int64(),
        "time": pa.timestamp("ms", tz="UTC"),
        "image": pa.int64(),
        **dict.fromkeys(NUMBERS, pa.float64()),
        "scores": pa.map_(pa.string(), pa.float64()),
        "thresholds": pa.map_(pa.string(), pa.float64()),
    }
    schema = pa.schema([(name, special.get(name, pa.string())) for name in COLUMNS])
    remaining, count = iter(records), 0
    with parquet.ParquetWriter(file, schema) as writer:
        while chunk := list(islice(remaining, _CHUNK)):
            rows = []
            for record in chunk:
                row = record.document() | {"time": datetime.fromisoformat(record.time)}
                for name in ("scores", "thresholds"):
                    row[name] = list(row[name].items())
                rows.append(row)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(chunk)
    return count
