"""State files changed at random: each is taken or refused in one sentence, and a sidecar's start goes on either way.

`KINDS` has what a sidecar keeps, and `mutated` what may have happened to it.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from guard.errors import EmbeddingsError, EvidenceError, StateError
from guard.evidence import EVIDENCE_FILE, EvidenceLog, EvidenceWriter, Record, writer
from guard.screening import Monitor
from guard.screening.monitor import WatchedScore
from guard.sidecar.decisions.reservoir import Reservoir, about_file, store

MUTATIONS = int(os.environ.get("GUARD_FUZZ_EXAMPLES", "60"))
"""How many changes of each kind of state are tried."""
WAIT = 30.0


@dataclass(frozen=True)
class StateKind:
    """One kind of state.

    Attributes:
        name: Its name.
        file: The file that is changed.
        make: Writes whole state to a folder.
        start: Does with the folder what a start does; returns whether the state was taken. An error is a failure.
    """

    name: str
    file: str
    make: Callable[[Path], None]
    start: Callable[[Path], bool]


def _monitor() -> Monitor:
    return Monitor([WatchedScore("a", "attack", 500), WatchedScore("d", "drift", 500)], run_length=1e4)


def _make_monitor(folder: Path) -> None:
    monitor, generator = _monitor(), np.random.default_rng(0)
    for p_value in generator.random(300) ** 3:
        monitor.observe({"a": float(p_value), "d": float(p_value)})
    monitor.save(folder / "monitor.json")


def _start_monitor(folder: Path) -> bool:
    monitor = _monitor()
    before = monitor.state()
    try:
        monitor.load(folder / "monitor.json")
    except StateError:
        assert monitor.state() == before
        return False
    assert monitor.state() == json.loads((folder / "monitor.json").read_bytes())
    monitor.observe({"a": 0.5, "d": 0.5})
    return True


_SIZE, _DIMENSION = 20, 4


def _make_sample(folder: Path) -> None:
    sample = Reservoir(_SIZE, _DIMENSION)
    sample.add(np.random.default_rng(0).normal(size=(50, _DIMENSION)).astype(np.float32))
    store(folder / "traffic.npy", *sample.snapshot(), "digest")


def _start_sample(folder: Path) -> bool:
    sample = Reservoir(_SIZE, _DIMENSION)
    try:
        sample.restore(folder / "traffic.npy", "digest")
    except (StateError, EmbeddingsError):
        assert sample.seen == 0
        return False
    sample.add(np.ones((100, _DIMENSION), np.float32))
    assert np.isfinite(sample.embeddings).all()
    return sample.seen > 100


def _record(request_id: str) -> Record:
    return Record(request_id, "m", "sha256:00", 0, "flag", "tag")


def _make_evidence(folder: Path) -> None:
    opened = EvidenceWriter(folder / EVIDENCE_FILE)
    for number in range(40):
        opened.record(_record(f"before {number}"))
    assert opened.close(WAIT)


def _start_evidence(folder: Path) -> bool:
    path = folder / EVIDENCE_FILE
    damaged: list[None] = []
    opened = EvidenceWriter(path, on_damage=lambda: damaged.append(None))
    opened.record(_record("after"))
    assert opened.close(WAIT), "the new record is lost"
    assert len(list(folder.glob(f"{EVIDENCE_FILE}.damaged-*[0-9Z]"))) == len(damaged)
    try:
        assert next(EvidenceLog(path).records(limit=1)).request_id == "after"
    except EvidenceError:
        assert not damaged  # a log that was begun anew is whole
    return not damaged


KINDS = (
    StateKind("monitor", "monitor.json", _make_monitor, _start_monitor),
    StateKind("sample", "traffic.npy", _make_sample, _start_sample),
    StateKind("sample's description", "traffic.json", _make_sample, _start_sample),
    StateKind("evidence log", EVIDENCE_FILE, _make_evidence, _start_evidence),
)


def mutated(data: bytes, seed: int) -> bytes:
    """Data with a few changes of the kinds that disks, power losses and hands make."""
    generator, changed = np.random.default_rng(seed), bytearray(data)
    for _ in range(generator.integers(1, 4)):
        if not changed:
            break
        at = int(generator.integers(len(changed) if generator.random() < 0.5 else min(len(changed), 128)))
        length = int(generator.integers(1, 64))
        kind = generator.integers(7)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == 3:
            changed[at : at + length] = generator.bytes(length)
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at:at] = b"-1e999,[NaN]{}"[: length + 1]
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_start_goes_on_whatever_happened_to_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: StateKind
) -> None:
    monkeypatch.setattr(writer, "_FIRST_DELAY", 0.001)
    (tmp_path / "whole").mkdir()
    kind.make(tmp_path / "whole")
    assert kind.start(tmp_path / "whole")
    (tmp_path / "again").mkdir()
    kind.make(tmp_path / "again")
    whole = (tmp_path / "again" / kind.file).read_bytes()
    taken = 0
    for seed in range(MUTATIONS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for file in (tmp_path / "again").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / kind.file).write_bytes(mutated(whole, seed))
        taken += kind.start(folder)
    assert 0 <= taken < MUTATIONS


def test_the_description_lies_beside_the_sample() -> None:
    assert about_file(Path("a/traffic-m@1.0.npy")) == Path("a/traffic-m@1.0.json")
