"""The writer keeps within its limits, and no trouble with the file reaches the requests."""

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from guard.errors import EvidenceError, UsageError
from guard.evidence import Drop, EvidenceLog, EvidenceWriter, Record, store
from tests.unit.evidence.conftest import WAIT, Messages

Make = Callable[..., Record]
Fill = Callable[..., None]


class Losses:
    """Counts what is lost."""

    def __init__(self) -> None:
        self.counts: Counter[Drop] = Counter()

    def __call__(self, reason: Drop, number: int) -> None:
        self.counts[reason] += number


def names(path: Path) -> list[str]:
    return [item.request_id for item in EvidenceLog(path).records()]


def locked(path: Path) -> sqlite3.Connection:
    """Another program that holds the file."""
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def test_close_writes_all_that_waits(path: Path, record: Make) -> None:
    writer = EvidenceWriter(path)
    assert all(writer.record(record(str(k))) for k in range(1000))
    assert writer.close(WAIT)
    assert EvidenceLog(path).count() == 1000


def test_a_record_after_the_end_is_counted(path: Path, record: Make) -> None:
    losses = Losses()
    writer = EvidenceWriter(path, on_drop=losses)
    assert writer.close(WAIT)
    assert not writer.record(record())
    assert losses.counts == {Drop.CLOSED: 1}


def test_the_newest_rows_are_kept_and_ids_are_not_given_again(path: Path, record: Make, fill: Fill) -> None:
    fill(*(record(str(k)) for k in range(40)), max_rows=8)
    assert names(path) == [str(k) for k in range(39, 31, -1)]
    fill(record("next"), max_rows=8)
    assert next(EvidenceLog(path).records()).id == 41


def test_old_records_are_deleted(path: Path, record: Make, fill: Fill) -> None:
    fill(record("old", time="2020-01-01T00:00:00Z"), record("new"), max_rows=8, max_age_days=30)
    assert names(path) == ["new"]


def test_the_file_stays_below_its_size(path: Path, record: Make, fill: Fill) -> None:
    fill(*(record(str(k), thumbnail=bytes(8000)) for k in range(600)), max_bytes=2**18)
    assert path.stat().st_size <= 2**18
    left = names(path)
    assert left == [str(k) for k in range(599, 599 - len(left), -1)]
    assert len(left) >= 15


def test_the_file_shrinks_when_a_limit_is_lowered(path: Path, record: Make, fill: Fill) -> None:
    fill(*(record(str(k), thumbnail=bytes(8000)) for k in range(200)))
    large = path.stat().st_size
    assert large > 1_600_000
    fill(record("last"), max_rows=8)
    assert path.stat().st_size < large / 10


@pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_bytes": 1000}, {"max_age_days": 0.0}, {"queue": 0}])
def test_limits_out_of_range_are_refused(path: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(limits))} of the evidence log must"):
        EvidenceWriter(path, **limits)


def test_more_than_the_queue_holds_is_counted(path: Path, record: Make) -> None:
    losses = Losses()
    writer = EvidenceWriter(path, queue=4, on_drop=losses)
    holder = locked(path)
    taken = [writer.record(record(str(k))) for k in range(7)]
    holder.close()
    assert writer.close(WAIT)
    assert taken == [True] * 4 + [False] * 3
    assert losses.counts == {Drop.QUEUE_FULL: 3}
    assert names(path) == ["3", "2", "1", "0"]


def test_a_full_disk_is_counted_and_left_behind(
    path: Path, record: Make, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, full, room = Losses(), messages.event("cannot be written (disk_full)"), messages.event("be written again")
    pragmas = store._PRAGMAS
    EvidenceWriter(path).close(WAIT)
    # SQLite says the same where the file may not grow as where the disk has no room.
    monkeypatch.setattr(store, "_PRAGMAS", (*pragmas, "PRAGMA max_page_count = 8"))
    writer = EvidenceWriter(path, queue=4, on_drop=losses)
    taken = [writer.record(record(str(k), thumbnail=bytes(60_000))) for k in range(4)]
    assert full.wait(WAIT)
    assert writer.trouble is Drop.DISK_FULL
    assert not writer.record(record("lost"))
    assert losses.counts == {Drop.DISK_FULL: 1}
    monkeypatch.setattr(store, "_PRAGMAS", (*pragmas, "PRAGMA max_page_count = 100000"))
    assert room.wait(WAIT)
    assert writer.trouble is None
    assert writer.record(record("after"))
    assert writer.close(WAIT)
    assert taken == [True] * 4
    assert names(path) == ["after", "3", "2", "1", "0"]


def test_what_a_full_disk_never_took_is_counted_at_the_end(
    path: Path, record: Make, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, full = Losses(), messages.event("cannot be written (disk_full)")
    EvidenceWriter(path).close(WAIT)
    monkeypatch.setattr(store, "_PRAGMAS", (*store._PRAGMAS, "PRAGMA max_page_count = 8"))
    writer = EvidenceWriter(path, on_drop=losses)
    for k in range(3):
        assert writer.record(record(str(k), thumbnail=bytes(60_000)))
    assert full.wait(WAIT)
    assert not writer.close(WAIT)
    assert losses.counts == {Drop.DISK_FULL: 3}


def test_a_locked_file_is_written_when_it_is_free(path: Path, record: Make, messages: Messages) -> None:
    refused, free = messages.event("cannot be written (locked)"), messages.event("be written again")
    writer = EvidenceWriter(path)
    assert writer.record(record("first"))
    holder = locked(path)
    assert writer.record(record("second"))
    assert refused.wait(WAIT)
    holder.close()
    assert free.wait(WAIT)
    assert writer.close(WAIT)
    assert names(path) == ["second", "first"]


def test_a_file_that_is_damaged_later_is_moved_aside(path: Path, record: Make, messages: Messages) -> None:
    moved = messages.event("a new one is begun")
    writer = EvidenceWriter(path)
    assert writer.record(record("before"))
    other = path.with_name("other")
    other.write_text("not a database\n" * 1000)
    other.replace(path)
    assert writer.record(record("after"))
    assert moved.wait(WAIT)
    assert writer.close(WAIT)
    assert names(path)[0] == "after"
    (aside,) = path.parent.glob("evidence.db.damaged-*[0-9Z]")
    assert aside.read_text().startswith("not a database")


def test_a_shared_file_that_is_damaged_later_is_counted_until_it_is_moved_away(
    path: Path, record: Make, messages: Messages
) -> None:
    spoiled, again = messages.event("cannot be written (damaged)"), messages.event("be written again")
    writer = EvidenceWriter(path, shared=True)
    other = path.with_name("other")
    other.write_text("not a database\n" * 1000)
    other.replace(path)
    assert writer.record(record("kept"))
    assert spoiled.wait(WAIT)
    path.unlink()
    assert again.wait(WAIT)
    assert writer.close(WAIT)
    assert names(path) == ["kept"]


def test_a_file_that_is_moved_away_is_made_anew(path: Path, record: Make, fill: Fill) -> None:
    fill(record("before"))
    writer = EvidenceWriter(path)
    path.rename(path.with_name("archive"))
    assert writer.record(record("after"))
    assert writer.close(WAIT)
    assert names(path) == ["after"]


def test_records_that_no_retry_would_save_do_not_hold_up_the_others(
    path: Path, record: Make, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, failed, add = Losses(), messages.event("could not be written"), store.add

    def fail_once(connection: Connection, records: list[Record]) -> None:
        if not failed.is_set():
            raise TypeError("nobody foresaw this")
        add(connection, records)

    monkeypatch.setattr(store, "add", fail_once)
    writer = EvidenceWriter(path, on_drop=losses)
    assert writer.record(record("bad"))
    assert failed.wait(WAIT)
    assert writer.record(record("good"))
    assert writer.close(WAIT)
    assert losses.counts == {Drop.ERROR: 1}
    assert names(path) == ["good"]


def test_limits_that_cannot_be_enforced_cost_no_record(
    path: Path, record: Make, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, failed, prune = Losses(), messages.event("could not be written"), store.prune

    def fail_once(connection: Connection, **limits: Any) -> None:
        if not failed.is_set():
            raise TypeError("nobody foresaw this")
        prune(connection, **limits)

    monkeypatch.setattr(store, "prune", fail_once)
    writer = EvidenceWriter(path, max_rows=8, on_drop=losses)
    for k in range(20):
        assert writer.record(record(str(k)))
    assert failed.wait(WAIT)
    assert writer.close(WAIT)
    assert (losses.counts, names(path)) == ({}, [str(k) for k in range(19, 11, -1)])


def test_it_is_read_while_it_is_written(path: Path, record: Make) -> None:
    writer = EvidenceWriter(path, queue=5000)
    log, seen = EvidenceLog(path), 0
    for k in range(2000):
        assert writer.record(record(str(k)))
        if k % 400 == 0:
            ids = [item.id for item in log.records()]
            assert ids == sorted(ids, reverse=True)
            assert len(ids) >= seen
            seen = len(ids)
    assert writer.close(WAIT)
    assert log.count() == 2000


def test_several_writers_that_start_together_share_a_file(path: Path, record: Make) -> None:
    start, closed = threading.Barrier(4), []

    def work(name: str) -> None:
        start.wait(WAIT)
        writer = EvidenceWriter(path)
        for k in range(200):
            writer.record(record(f"{name}-{k}"))
        closed.append(writer.close(WAIT))

    threads = [threading.Thread(target=work, args=(str(k),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert closed == [True] * 4
    assert sorted(names(path)) == sorted(f"{name}-{k}" for name in range(4) for k in range(200))


def test_a_file_that_may_not_be_written_is_refused_at_the_start(
    path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill()
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root, who may run the tests, may write everything
    with pytest.raises(EvidenceError, match=r"cannot write the evidence log .*: Permission denied"):
        EvidenceWriter(path)
