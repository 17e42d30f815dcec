"""State that is damaged, shared by mistake, or judged by a wrong clock."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from guard import _files
from guard.errors import EmbeddingsError, EvidenceError, StateError, UsageError
from guard.evidence import EVIDENCE_FILE, EvidenceLog, EvidenceWriter, Record
from guard.evidence import clock as clocks
from guard.evidence.clock import TRUST_SECONDS, Clock
from guard.profiles import read_embeddings
from guard.screening import Monitor
from guard.screening.monitor import WatchedScore
from guard.sidecar.decisions import state
from guard.sidecar.decisions.reservoir import Reservoir, about_file, store
from guard.sidecar.decisions.state import LOCK_FILE, check_unused, hold

WAIT = 30.0
DAY = 86_400.0


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def wrong_type(path: Path) -> None:
    path.write_bytes(b"[1, 2, 3]")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def unreadable(path: Path) -> None:
    path.chmod(0)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = [truncated, empty, wrong_type, directory, pipe, loop]
if os.geteuid() != 0:  # root may read everything
    DAMAGES.append(unreadable)


def record(request_id: str = "r", **values: object) -> Record:
    return Record(request_id, "m", "sha256:00", 0, "flag", "tag", **values)  # type: ignore[arg-type] # a time


def filled(path: Path, *times: datetime) -> None:
    writer = EvidenceWriter(path)
    for number, moment in enumerate(times or [datetime.now(UTC)]):
        writer.record(record(str(number), time=moment.isoformat()))
    assert writer.close(WAIT)


class TestEvidence:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_log_goes_aside_whole_and_a_new_one_is_begun(
        self, tmp_path: Path, damage: Callable[[Path], None]
    ) -> None:
        path, told = tmp_path / EVIDENCE_FILE, []
        filled(path)
        damage(path)
        before = path.read_bytes() if path.is_file() else None
        writer = EvidenceWriter(path, on_damage=lambda: told.append(1))
        writer.record(record("new"))
        assert writer.close(WAIT)
        (aside,) = tmp_path.glob(f"{EVIDENCE_FILE}.damaged-*[0-9Z]")
        assert told == [1]
        assert before is None or aside.read_bytes() == before
        assert [each.request_id for each in EvidenceLog(path).records()] == ["new"]

    def test_the_write_ahead_log_stays_with_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / EVIDENCE_FILE
        filled(path)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).write_bytes(suffix.encode())
        path.write_bytes(b"no database" * 100)
        assert EvidenceWriter(path).close(WAIT)
        asides = {each.name.rpartition("Z")[2]: each.read_bytes() for each in tmp_path.glob("*.damaged-*")}
        assert asides == {"": b"no database" * 100, "-wal": b"-wal", "-shm": b"-shm"}

    @pytest.mark.parametrize("suffix", ["-wal", "-shm"])
    def test_a_folder_in_the_place_of_a_companion_stops_nothing(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / EVIDENCE_FILE
        filled(path)
        path.with_name(path.name + suffix).mkdir()
        writer = EvidenceWriter(path)
        writer.record(record("new"))
        assert writer.close(WAIT)
        assert next(EvidenceLog(path).records()).request_id == "new"

    def test_a_write_ahead_log_without_its_file_is_not_taken_for_that_of_the_new_one(self, tmp_path: Path) -> None:
        path = tmp_path / EVIDENCE_FILE
        path.with_name(path.name + "-wal").write_bytes(b"of another file")
        assert EvidenceWriter(path).close(WAIT)
        (aside,) = tmp_path.glob("*.damaged-*-wal")
        assert aside.read_bytes() == b"of another file"

    def test_several_damaged_logs_are_all_kept(self, tmp_path: Path) -> None:
        path = tmp_path / EVIDENCE_FILE
        for number in range(4):
            path.write_text(f"damaged {number}")
            assert EvidenceWriter(path).close(WAIT)
        assert {each.read_text() for each in tmp_path.glob("*.damaged-*")} == {f"damaged {n}" for n in range(4)}

    def test_a_locked_log_is_not_damaged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("guard.evidence.store.BUSY_SECONDS", 0.001)
        path = tmp_path / EVIDENCE_FILE
        filled(path)
        other = sqlite3.connect(path)
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(EvidenceError, match=r"cannot be opened .*locked"):
            EvidenceWriter(path)
        other.close()
        assert list(tmp_path.glob("*.damaged-*")) == []


class TestClock:
    """A clock that jumps deletes nothing."""

    @staticmethod
    def clock(newest: float | None, start: float = 1000 * DAY) -> tuple[Clock, list[float]]:
        times = [start, 5.0]
        last = None if newest is None else datetime.fromtimestamp(newest, UTC)
        return Clock(lambda _: last, lambda: times[0], lambda: times[1]), times

    @pytest.mark.parametrize("jump", [400 * DAY, -400 * DAY, 3600.0])
    def test_after_a_jump_no_age_is_believed_until_it_ran_evenly_for_hours(self, jump: float) -> None:
        clock, times = self.clock(1000 * DAY - DAY)
        assert clock.is_believed()
        times[0] += 600 + jump
        times[1] += 600
        for _ in range(int(TRUST_SECONDS / 600)):
            assert not clock.is_believed()
            times[0] += 600
            times[1] += 600
        assert clock.is_believed()

    def test_small_corrections_are_no_jump(self) -> None:
        clock, times = self.clock(None)
        for _ in range(20):
            times[0] += 600 + 2
            times[1] += 600
            assert clock.is_believed()

    @pytest.mark.parametrize(("pause", "believed"), [(DAY, True), (400 * DAY, False), (8 * DAY, False)])
    def test_at_the_start_it_is_compared_with_the_records(self, pause: float, believed: bool) -> None:  # noqa: FBT001
        clock, _ = self.clock(1000 * DAY - pause)
        assert clock.is_believed() is believed

    @pytest.mark.parametrize("days", [400, -400])
    def test_a_start_with_a_clock_that_is_wrong_by_400_days_deletes_nothing(self, tmp_path: Path, days: int) -> None:
        path, now = tmp_path / EVIDENCE_FILE, datetime.now(UTC)
        filled(path, *(now - timedelta(days=days + age) for age in (80, 40, 1)))
        for _ in range(3):  # what is written meanwhile has the wrong time too, and proves nothing
            writer = EvidenceWriter(path, max_age_days=90)
            writer.record(record("new"))
            assert writer.close(WAIT)
        assert EvidenceLog(path).count() == 6

    def test_a_jump_while_it_runs_deletes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, now = tmp_path / EVIDENCE_FILE, datetime.now(UTC)
        filled(path, *(now - timedelta(days=age) for age in (80, 40, 1)))
        jumped = [0.0]

        class Later(datetime):
            @classmethod
            def now(cls, _tz: object = None) -> "datetime":  # type: ignore[override]
                return datetime.now(UTC) + timedelta(seconds=jumped[0])

        monkeypatch.setattr("guard.evidence.store.datetime", Later)
        monkeypatch.setattr(clocks, "_now", lambda: time.time() + jumped[0])
        writer = EvidenceWriter(path, max_rows=8, max_age_days=90)
        jumped[0] = 400 * DAY
        for number in range(4):
            writer.record(record(str(number)))
        assert writer.close(WAIT)
        assert EvidenceLog(path).count() == 7

    def test_old_records_are_deleted_a_share_at_a_time(self, tmp_path: Path) -> None:
        path, now = tmp_path / EVIDENCE_FILE, datetime.now(UTC)
        writer = EvidenceWriter(path, queue=1000, max_age_days=1000)
        for number in range(600):
            writer.record(record(str(number), time=(now - timedelta(days=100)).isoformat()))
        writer.record(record("near", time=(now - timedelta(days=1)).isoformat()))
        assert writer.close(WAIT)
        assert EvidenceWriter(path, max_age_days=90).close(WAIT)
        assert 601 - 2 * 256 - 1 <= EvidenceLog(path).count() < 601


class TestMonitor:
    @staticmethod
    def monitor() -> Monitor:
        return Monitor([WatchedScore("a", "attack", 500)])

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_state_is_one_error_that_changes_nothing(
        self, tmp_path: Path, damage: Callable[[Path], None]
    ) -> None:
        path = tmp_path / "monitor.json"
        self.monitor().save(path)
        damage(path)
        monitor = self.monitor()
        with pytest.raises(StateError):
            monitor.load(path)
        assert monitor.state() == self.monitor().state()

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_it_is_moved_aside_counted_and_told(
        self, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        path, counted = tmp_path / "monitor.json", list[str]()
        self.monitor().save(path)
        damage(path)
        state.set_aside(path, "monitor", StateError("it is damaged"), counted.append)
        assert counted == ["monitor"]
        assert not os.path.lexists(path)
        assert len(list(tmp_path.glob("monitor.json.damaged-*"))) == 1
        assert "it is damaged; it was moved to monitor.json.damaged-" in caplog.text


class TestSample:
    @staticmethod
    def stored(folder: Path, size: int = 20, seen: int = 100) -> tuple[Path, Reservoir]:
        sample, path = Reservoir(size, 4), folder / "traffic-m.npy"
        sample.add(np.random.default_rng(1).normal(size=(seen, 4)).astype(np.float32))
        store(path, *sample.snapshot(), "digest")
        return path, sample

    def test_it_survives_a_restart(self, tmp_path: Path) -> None:
        path, before = self.stored(tmp_path)
        after = Reservoir(20, 4)
        after.restore(path, "digest")
        np.testing.assert_array_equal(after.embeddings, before.embeddings)
        assert after.seen == 100
        np.testing.assert_array_equal(read_embeddings(path, 4), before.embeddings)

    def test_it_stays_uniform_over_restarts(self, tmp_path: Path) -> None:
        """Every embedding has the same chance, whether it came before a restart or after one."""
        path, kept = tmp_path / "traffic-m.npy", np.zeros(40)
        for seed in range(400):
            rows = np.repeat(np.arange(40, dtype=np.float32)[:, None], 4, axis=1)
            for part in np.split(rows, 4):
                sample = Reservoir(8, 4, seed=seed)
                if part[0, 0]:
                    sample.restore(path, "digest")
                sample.add(part)
                store(path, *sample.snapshot(), "digest")
            kept[sample.embeddings[:, 0].astype(int)] += 1
        # 400 draws with chance 0.2: ten standard deviations are 80.
        assert np.abs(kept - 80).max() < 40

    def test_a_sample_of_another_model_is_not_continued(self, tmp_path: Path) -> None:
        path, _ = self.stored(tmp_path)
        after = Reservoir(20, 4)
        after.restore(path, "another")
        assert after.seen == 0

    @pytest.mark.parametrize(("size", "rows", "seen"), [(8, 8, 100), (20, 20, 100), (50, 20, 20)])
    def test_its_size_may_change(self, tmp_path: Path, size: int, rows: int, seen: int) -> None:
        path, before = self.stored(tmp_path)
        after = Reservoir(size, 4)
        after.restore(path, "digest")
        assert (len(after.embeddings), after.seen) == (rows, seen)
        assert {tuple(row) for row in after.embeddings} <= {tuple(row) for row in before.embeddings}

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("which", ["embeddings", "description"])
    def test_damage_is_one_error_that_changes_nothing(
        self, tmp_path: Path, damage: Callable[[Path], None], which: str
    ) -> None:
        path, _ = self.stored(tmp_path)
        damage(path if which == "embeddings" else about_file(path))
        after = Reservoir(20, 4)
        with pytest.raises((StateError, EmbeddingsError)):
            after.restore(path, "digest")
        assert after.seen == 0

    def test_a_head_that_claims_more_than_the_file_holds_takes_no_memory(self, tmp_path: Path) -> None:
        path, _ = self.stored(tmp_path)
        data = path.read_bytes()
        claimed = data.replace(b"(20, 4)", b"(10000000000, 4)").replace(b" " * 9 + b"\n", b"\n", 1)
        assert len(claimed) == len(data)
        path.write_bytes(claimed)
        with pytest.raises(EmbeddingsError, match="is not a NumPy file of numbers"):
            read_embeddings(path, 4)

    @pytest.mark.parametrize("about", [{"format": 2}, {"seen": -1}, {"seen": "9"}, {"seen": 2**60}])
    def test_a_description_of_another_form_is_refused(self, tmp_path: Path, about: dict[str, object]) -> None:
        path, _ = self.stored(tmp_path)
        document = json.loads(about_file(path).read_text())
        about_file(path).write_text(json.dumps({**document, **about}))
        with pytest.raises(StateError):
            Reservoir(20, 4).restore(path, "digest")


class TestLock:
    @staticmethod
    def elsewhere(folder: Path, role: str) -> "subprocess.Popen[str]":
        """Another process that holds the folder until its standard input ends."""
        program = (
            "import sys; from pathlib import Path; from guard.sidecar.decisions.state import hold\n"
            f"with hold(Path(sys.argv[1]), {role!r}): print('held', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, str(folder)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @pytest.mark.parametrize("role", ["alone", "parent", "worker"])
    def test_a_second_sidecar_is_refused_whoever_of_the_first_is_left(self, tmp_path: Path, role: str) -> None:
        folder = tmp_path / "state"
        with self.elsewhere(folder, role) as first:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            for mine in ("alone", "parent"):
                with (
                    pytest.raises(UsageError, match=f"another sidecar uses the folder {folder}"),
                    hold(folder, mine),
                ):
                    pass
            if role == "alone":
                with pytest.raises(UsageError, match="another sidecar"):
                    check_unused(folder)
            first.communicate()
        with hold(folder, "alone"):
            pass

    def test_the_workers_of_one_sidecar_share_it(self, tmp_path: Path) -> None:
        with hold(tmp_path, "parent"), hold(tmp_path, "worker"), hold(tmp_path, "worker"):
            pass

    def test_a_check_makes_nothing(self, tmp_path: Path) -> None:
        check_unused(tmp_path)
        check_unused(tmp_path / "absent")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_what_lies_in_its_place_stops_nothing(self, tmp_path: Path, damage: Callable[[Path], None]) -> None:
        (tmp_path / LOCK_FILE).write_bytes(b"something")
        damage(tmp_path / LOCK_FILE)
        counted: list[str] = []
        with hold(tmp_path, "alone", counted.append):
            assert (tmp_path / LOCK_FILE).is_file()
        aside = list(tmp_path.glob(f"{LOCK_FILE}.damaged-*"))
        assert counted == ["lock"] * len(aside)

    def test_what_a_killed_sidecar_was_writing_is_swept_away_and_nothing_else(self, tmp_path: Path) -> None:
        left = (".monitor-1.json.abc", ".traffic-m.npy.abc")
        kept = ("monitor-1.json", "traffic-m.npy", "monitor-1.json.damaged-1", ".other")
        for name in (*left, *kept):
            (tmp_path / name).touch()
        with hold(tmp_path, "worker"):
            assert all((tmp_path / name).exists() for name in left)
        with hold(tmp_path, "alone"):
            assert {each.name for each in tmp_path.iterdir()} == {*kept, LOCK_FILE}

    def test_no_folder_needs_no_lock(self) -> None:
        with hold(None, "alone"):
            pass


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_state_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "state"
    before = os.umask(umask)
    try:
        with hold(folder, "alone"):
            TestMonitor.monitor().save(folder / "monitor.json")
            TestSample.stored(folder)
            writer = EvidenceWriter(folder / EVIDENCE_FILE)
            writer.record(record())
            assert writer.close(WAIT)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {each.name: oct(each.stat().st_mode & 0o777) for each in folder.iterdir()} == dict.fromkeys(
        (LOCK_FILE, "monitor.json", "traffic-m.npy", "traffic-m.json", EVIDENCE_FILE), "0o600"
    )


def test_a_file_lies_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"  # noqa: PTH112
        events.append(kind)
        fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        events.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    _files.replace_file(tmp_path / "a", b"data")
    assert events == ["file", "replace", "folder"]
