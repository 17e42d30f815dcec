"""What is written can be found, and the file is judged before it is used."""

import math
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guard.errors import EvidenceError
from guard.evidence import EvidenceLog, EvidenceWriter, Record, RecordFilter
from guard.evidence.reading import _CHUNK
from tests.unit.evidence.conftest import WAIT

Make = Callable[..., Record]
Fill = Callable[..., None]


def found(path: Path, **wanted: Any) -> list[str]:
    """Request ids, in the order of the log; the count must agree."""
    log, conditions = EvidenceLog(path), RecordFilter(**wanted)
    names = [item.request_id for item in log.records(conditions)]
    assert log.count(conditions) == len(names)
    return names


def test_a_record_comes_back_whole(path: Path, record: Make, fill: Fill) -> None:
    given = record(
        "r-1",
        time="2026-05-09T12:00:00.123Z",
        trace_id="4bf9",
        image=3,
        predicted="dog",
        p_value=0.0005,
        alpha=0.001,
        scores={"trigger match": 2.5, "LID": -1.0},
        thresholds={"trigger match": 2.0},
        trigger="patch-1",
        target="dog",
        second_look="confirmed",
        explanation="with the trigger undone the answer changes",
        input_digest="ab" * 32,
        thumbnail=b"\xff\xd8\xff\x00",
    )
    fill(given)
    assert list(EvidenceLog(path).records()) == [EvidenceLog(path).get(1)]
    assert EvidenceLog(path).get(1) == Record(**{**vars(given), "id": 1})


def test_a_score_that_is_not_finite_comes_back_as_nan(path: Path, record: Make, fill: Fill) -> None:
    fill(record(scores={"LID": math.inf}))
    assert math.isnan(EvidenceLog(path).get(1).scores["LID"])


def test_each_condition_selects(path: Path, record: Make, fill: Fill) -> None:
    fill(
        record("a", time="2026-05-01T00:00:00Z", model="n", p_value=0.5),
        record("b", time="2026-05-02T00:00:00Z", decision="unchecked", trigger="patch-1"),
        record("c", time="2026-05-03T00:00:00Z", predicted="dog", p_value=0.001),
        max_age_days=36_500,
    )
    assert found(path) == ["c", "b", "a"]
    assert found(path, since="2026-05-02T00:00:00Z") == ["c", "b"]
    assert found(path, until="2026-05-02T00:00:00Z") == ["a"]
    assert found(path, model="n") == ["a"]
    assert found(path, decision="unchecked") == ["b"]
    assert found(path, trigger="patch-1") == ["b"]
    assert found(path, predicted="dog") == ["c"]
    assert found(path, request_id="a") == ["a"]
    assert found(path, p_value=0.001) == ["c"]
    assert found(path, model="m", predicted="cat") == []


def test_a_request_id_is_found_by_what_the_client_sent(path: Path, record: Make, fill: Fill) -> None:
    sent = "'; DROP TABLE records; --\n" + "x" * 1000
    fill(record(sent), record("other"))
    assert len(found(path, request_id=sent)) == 1


def test_limit_and_offset_hold_over_chunks(path: Path, record: Make, fill: Fill) -> None:
    number = 2 * _CHUNK + 5
    fill(*(record(str(k)) for k in range(number)))
    log = EvidenceLog(path)
    assert [item.id for item in log.records()] == list(range(number, 0, -1))
    assert [item.id for item in log.records(limit=_CHUNK + 1, offset=3)] == list(range(number - 3, 1, -1))[: _CHUNK + 1]
    assert list(log.records(offset=number)) == []


@pytest.mark.parametrize("identity", [0, -1, 2, 2**64])
def test_a_record_that_is_not_there_is_an_error(path: Path, record: Make, fill: Fill, identity: int) -> None:
    fill(record())
    with pytest.raises(EvidenceError, match=f"has no record {identity}"):
        EvidenceLog(path).get(identity)


def test_reading_writes_nothing(path: Path, record: Make, fill: Fill) -> None:
    fill(record())
    before = path.read_bytes()
    EvidenceLog(path).count()
    assert path.read_bytes() == before


def test_only_the_owner_may_read_it(path: Path, record: Make) -> None:
    old = os.umask(0)
    try:
        writer = EvidenceWriter(path)
        writer.record(record())
        assert writer.close(30)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["per cent %41", "why?", "ha#sh", "späße"])
def test_names_of_files_are_taken_as_they_are(tmp_path: Path, record: Make, name: str) -> None:
    writer = EvidenceWriter(tmp_path / name)
    writer.record(record())
    assert writer.close(30)
    assert EvidenceLog(tmp_path / name).count() == 1


def damaged(path: Path, fill: Fill) -> None:
    fill()
    data = bytearray(path.read_bytes())
    data[100:] = b"\xff" * (len(data) - 100)
    path.write_bytes(data)


def foreign(path: Path, _: Fill) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE records (id INTEGER)")
    connection.close()


def newer(path: Path, fill: Fill) -> None:
    fill()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def other_columns(path: Path, fill: Fill) -> None:
    fill()
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE records DROP COLUMN mode")
    connection.close()


def of_release_0_1(path: Path, fill: Fill, record: Make) -> None:
    """A log as release 0.1.0 wrote it, with one record."""
    fill(record("old", trigger="patch-1"))
    connection = sqlite3.connect(path)
    for name in ("decided_by", "reference", "text"):
        connection.execute(f"ALTER TABLE records DROP COLUMN {name}")
    connection.execute("PRAGMA user_version = 1")
    connection.close()


def test_a_log_of_an_older_guard_is_read_as_it_is_and_brought_up_to_date_by_a_writer(
    path: Path, fill: Fill, record: Make
) -> None:
    of_release_0_1(path, fill, record)
    opened = EvidenceLog(path)
    (old,) = opened.records()
    assert (old.request_id, old.trigger, old.decided_by, old.reference) == ("old", "patch-1", "", "")
    assert opened.count(RecordFilter(decided_by="divergence")) == 0
    assert opened.count(RecordFilter(trigger="patch-1")) == 1
    EvidenceWriter.check(path)
    fill(record("new", decided_by="divergence", reference="dog", text="a dog"))
    # A reader that was there before goes on.
    assert [each.request_id for each in opened.records()] == ["new", "old"]
    new, old = EvidenceLog(path).records()
    assert (new.decided_by, new.reference, new.text) == ("divergence", "dog", "a dog")
    assert (old.decided_by, old.reference, old.text) == ("", "", "")
    assert EvidenceLog(path).count(RecordFilter(decided_by="divergence")) == 1
    assert not list(path.parent.glob("*.damaged-*"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "is damaged, or is not an evidence log"),
        (foreign, "is not an evidence log"),
        (newer, "has schema 99, this guard knows 3; read it with a newer guard"),
        (other_columns, "is damaged, or is not an evidence log"),
        (lambda path, _: path.write_text("a,b,c\n" * 1000), "is damaged, or is not an evidence log"),
        (lambda path, _: path.touch(), "is not an evidence log"),
        (lambda path, _: path.mkdir(), "is not a regular file"),
    ],
)
def test_a_file_that_is_no_log_is_refused_by_readers_and_moved_aside_by_writers(
    path: Path, fill: Fill, spoil: Callable[[Path, Fill], object], message: str
) -> None:
    spoil(path, fill)
    with pytest.raises(EvidenceError, match=message):
        EvidenceLog(path)
    assert EvidenceWriter(path).close(WAIT)
    assert EvidenceLog(path).count() == 0
    assert len(list(path.parent.glob("evidence.db.damaged-*[0-9Z]"))) == 1


def test_a_missing_log_is_an_error_for_readers_alone(path: Path) -> None:
    with pytest.raises(EvidenceError, match="there is no evidence log"):
        EvidenceLog(path)
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EvidenceError, match="cannot write the evidence log"):
        EvidenceWriter(tmp_path / "file" / "evidence.db")


@pytest.mark.parametrize(
    "change",
    [
        "scores = '[' || hex(zeroblob(10))",
        'scores = \'{"a": "b"}\'',
        "thresholds = 'null'",
        "time = 'now'",
        "model = x'00'",
        "image = 'first'",
        "image = -1",
        "image = 1 << 32",
    ],
)
def test_a_record_that_no_guard_wrote_is_an_error(path: Path, record: Make, fill: Fill, change: str) -> None:
    fill(record())
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE records SET {change}")  # noqa: S608 - the test's own
    connection.commit()
    connection.close()
    with pytest.raises(EvidenceError, match="record 1 of the evidence log is damaged"):
        EvidenceLog(path).get(1)


def test_a_record_with_a_number_below_one_is_an_error(path: Path, record: Make, fill: Fill) -> None:
    fill(record())
    connection = sqlite3.connect(path)
    connection.execute("UPDATE records SET id = -1")
    connection.commit()
    connection.close()
    with pytest.raises(EvidenceError, match="record -1 of the evidence log is damaged"):
        list(EvidenceLog(path).records())


def test_values_that_would_fill_the_memory_are_not_read(path: Path, record: Make, fill: Fill) -> None:
    fill(record())
    connection = sqlite3.connect(path)
    connection.execute("UPDATE records SET model = replace(hex(zeroblob(1100000)), '00', 'ab')")
    connection.commit()
    connection.close()
    with pytest.raises(EvidenceError, match="string or blob too big"):
        EvidenceLog(path)


def test_texts_are_cleaned_when_they_are_read_too(path: Path, record: Make, fill: Fill) -> None:
    fill(record())
    connection = sqlite3.connect(path)
    connection.execute("UPDATE records SET request_id = 'a' || char(27)")
    connection.commit()
    connection.close()
    assert EvidenceLog(path).get(1).request_id == "a\ufffd"
