"""Records on their way from many threads to those who follow."""

import asyncio
import threading
from pathlib import Path

import pytest

from guard.evidence import Drop, EvidenceLog, Record
from guard.sidecar import Settings
from guard.sidecar.decisions import evidence
from guard.sidecar.decisions.evidence import Follower, Recorder
from guard.sidecar.telemetry.metrics import Metrics

WAIT_SECONDS = 30


def a_record(number: int = 0, *, model: str = "classifier") -> Record:
    return Record(str(number), model, "0" * 64, 0, "flag", "tag")


def evidence_of(state: Path | None = None) -> Recorder:
    return Recorder(Settings.load(None, profile=Path("profile"), model=Path("model"), state_dir=state), Metrics())


async def some(follower: Follower) -> tuple[str, int] | None:
    """Request id of the next record, and the losses before it."""
    found = await asyncio.wait_for(follower.next(), WAIT_SECONDS)
    return None if found is None else (found[0].request_id, found[1])


async def everything(follower: Follower) -> list[tuple[str, int]]:
    """The same of all, up to the end."""
    found = []
    while (item := await some(follower)) is not None:
        found.append(item)
    return found


async def settled() -> None:
    """What other threads gave to the loop before has arrived."""
    await asyncio.sleep(0)


async def test_a_slow_reader_loses_the_newest_and_is_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_WAITING", 3)
    source = evidence_of()
    with source.followed() as slow, source.followed() as other:
        for number in range(5):
            source.record(a_record(number))
        await settled()
        assert [await some(slow), await some(slow), await some(slow)] == [("0", 0), ("1", 0), ("2", 0)]
        assert await some(other) == ("0", 0)
        source.record(a_record(5))
        source.record(a_record(6))
        await settled()
        source.end_followers()
        assert await everything(slow) == [("5", 2), ("6", 0)]
        assert await everything(other) == [("1", 0), ("2", 0), ("5", 2)]


async def test_every_record_of_many_threads_arrives_once() -> None:
    source, threads, each = evidence_of(), 8, 25
    with source.followed() as follower:

        def work(first: int) -> None:
            for number in range(first, first + each):
                source.record(a_record(number))

        running = [threading.Thread(target=work, args=(index * each,)) for index in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            await asyncio.to_thread(thread.join)
        await settled()
        source.end_followers()
        found = await everything(follower)
    assert sorted(int(number) for number, _ in found) == list(range(threads * each))
    assert {lost for _, lost in found} == {0}


async def test_a_reader_that_waits_is_woken_by_a_record_and_by_the_end() -> None:
    source = evidence_of()
    with source.followed() as follower:
        reading = asyncio.ensure_future(everything(follower))
        await settled()
        await asyncio.to_thread(source.record, a_record(1))
        await settled()
        assert not reading.done()
        source.end_followers()
        assert await reading == [("1", 0)]


async def test_records_that_are_not_wanted_neither_come_nor_count_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_WAITING", 1)
    source = evidence_of()
    with source.followed(lambda record: record.model == "mine") as follower:
        for number in range(3):
            source.record(a_record(number, model="theirs"))
        source.record(a_record(3, model="mine"))
        await settled()
        source.end_followers()
        assert await everything(follower) == [("3", 0)]


async def test_records_are_wanted_only_while_somebody_follows_or_there_is_a_log(tmp_path: Path) -> None:
    source = evidence_of()
    assert not source.wanted
    with source.followed() as follower:
        assert source.wanted
    assert not source.wanted
    source.record(a_record())
    await settled()
    follower.end()
    assert await everything(follower) == []
    logged = evidence_of(tmp_path)
    assert logged.wanted
    assert logged.close()


async def test_a_follower_and_the_log_get_the_same_records(tmp_path: Path) -> None:
    source = evidence_of(tmp_path)
    with source.followed() as follower:
        source.record(a_record(7))
        await settled()
        source.end_followers()
        assert await everything(follower) == [("7", 0)]
    assert source.close()
    assert [record.request_id for record in EvidenceLog(tmp_path / "evidence.sqlite").records()] == ["7"]


def test_trouble_is_that_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evidence_of().trouble is None
    source = evidence_of(tmp_path)
    assert source.trouble is None
    assert source._writer is not None
    monkeypatch.setattr(source._writer, "_trouble", Drop.DISK_FULL)  # a full disk is hard to come by
    assert source.trouble is Drop.DISK_FULL
    source.close()
