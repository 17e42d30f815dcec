import csv
import json
import math
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from guard.errors import MissingDependencyError, UsageError
from guard.evidence import Record, export
from guard.evidence.records import NUMBERS

Make = Callable[..., Record]


@pytest.fixture
def records(record: Make) -> list[Record]:
    return [
        record(
            "second",
            id=2,
            p_value=0.0005,
            alpha=0.001,
            scores={"trigger match": 2.5, "LID": math.nan},
            thresholds={"LID": 1},
            image=3,
        ),
        record("first, “quoted”\n", id=1, predicted="späße", explanation='he said "no"', thumbnail=b"\xff\xd8\xff"),
    ]


def from_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: json.loads(row[name]) for name in ("scores", "thresholds")}
        for name, kind in (("id", int), ("image", int), *((number, float) for number in NUMBERS)):
            row[name] = kind(row[name]) if row[name] else None
    return rows


def from_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def from_parquet(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    for row in rows:
        assert isinstance(row["time"], datetime)
        row["time"] = row["time"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
        row |= {name: dict(row[name]) for name in ("scores", "thresholds")}
    return rows


@pytest.mark.parametrize(
    ("suffix", "read"), [(".csv", from_csv), (".jsonl", from_jsonl), (".parquet", from_parquet), (".CSV", from_csv)]
)
def test_every_format_holds_the_same(
    tmp_path: Path, records: list[Record], suffix: str, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    path = tmp_path / "new" / f"export{suffix}"
    assert export(iter(records), path) == 2
    assert read(path) == [item.document() for item in records]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_export_of_nothing_is_a_readable_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"export{suffix}"
    assert export([], path) == 0
    assert {".csv": from_csv, ".jsonl": from_jsonl, ".parquet": from_parquet}[suffix](path) == []


def test_parquet_is_written_in_parts(tmp_path: Path, record: Make) -> None:
    assert export((record(str(k)) for k in range(2500)), tmp_path / "export.parquet") == 2500
    table = parquet.ParquetFile(tmp_path / "export.parquet")
    assert (table.num_row_groups, table.read().column("request_id").to_pylist()) == (3, [str(k) for k in range(2500)])


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "  =1", "＝1"])
def test_a_spreadsheet_finds_no_formula(tmp_path: Path, record: Make, text: str) -> None:
    export([record(text, predicted=text)], tmp_path / "export.csv")
    (row,) = from_csv(tmp_path / "export.csv")
    assert (row["request_id"], row["predicted"], row["model"]) == (f"'{text}", f"'{text}", "m")


def test_another_ending_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in one of \.csv, \.jsonl, \.parquet"):
        export(iter([]), tmp_path / "export.xlsx")


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path, record: Make) -> None:
    path = tmp_path / "export.csv"
    path.write_text("before")

    def broken() -> Any:
        yield record()
        raise UsageError("the log is gone")

    with pytest.raises(UsageError, match="the log is gone"):
        export(broken(), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        export([], tmp_path / "file" / "export.csv")


def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'clip-guard\[parquet\]'"):
        export([], tmp_path / "export.parquet")
    assert list(tmp_path.iterdir()) == []
