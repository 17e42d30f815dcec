"""A start with state that is whole, damaged or of another model: it goes on, and what was lost is counted and told."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.watch import Shared, Watch
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics
from tests.attacks.test_operations_state import DAMAGES


@pytest.fixture
def settings(exported: Path, profile_directory: Path, tmp_path: Path) -> Settings:
    state = tmp_path / "state"
    return Settings.load(None, model=exported, profile=profile_directory, state_dir=state, keep_embeddings=50)


@contextmanager
def started(settings: Settings) -> Iterator[tuple[Watch, Callable[[str], float]]]:
    """What is done with decisions, and how many files of a kind were damaged; as in a sidecar from start to end."""
    metrics = Metrics()
    shared = Shared(settings, Workers(1, 1), Recorder(settings, metrics))
    models = Models(shared, metrics)
    try:
        yield (
            models.served[0].checker.watch,
            lambda kind: metrics.registry.get_sample_value("guard_state_damaged_total", {"kind": kind}) or 0.0,
        )
    finally:
        shared.workers.close()
        models.save()
        shared.close()


def fill(watch: Watch) -> np.ndarray:
    assert watch.sample is not None
    watch.sample.add(np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32))
    assert watch._monitor is not None
    for p_value in np.random.default_rng(0).random(50):
        watch._monitor.observe(dict.fromkeys(watch._monitor._detectors, float(p_value)))
    return watch.sample.embeddings.copy()


def test_sample_and_monitor_survive_a_restart(settings: Settings) -> None:
    with started(settings) as (watch, _):
        sample = fill(watch)
        assert watch._monitor is not None
        monitor = watch._monitor.state()
    with started(settings) as (watch, damaged):
        assert watch.sample is not None
        assert watch._monitor is not None
        np.testing.assert_array_equal(watch.sample.embeddings, sample)
        assert watch._monitor.state() == monitor
        assert damaged("sample") == damaged("monitor") == 0


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("monitor-*.json", "monitor"),
        ("traffic-*.npy", "sample"),
        ("traffic-*.json", "sample"),
        ("*.sqlite", "evidence"),
    ],
)
def test_damage_stops_no_start(
    settings: Settings, damage: Callable[[Path], None], pattern: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with started(settings) as (watch, _):
        fill(watch)
    folder = settings.state_dir
    assert folder is not None
    (file,) = folder.glob(pattern)
    damage(file)
    with started(settings) as (watch, damaged):
        assert {each: damaged(each) for each in ("monitor", "sample", "evidence", "lock")} == {
            **dict.fromkeys(("monitor", "sample", "evidence", "lock"), 0.0),
            kind: 1.0,
        }
        assert "a new one is begun" in caplog.text
        fill(watch)
    assert any(".damaged-" in each.name for each in folder.iterdir())
    with started(settings) as (_, damaged):
        assert damaged(kind) == 0


def test_another_run_length_begins_the_monitor_anew_and_keeps_the_old_state(
    exported: Path, profile_directory: Path, tmp_path: Path
) -> None:
    values = {"model": exported, "profile": profile_directory, "state_dir": tmp_path / "state"}
    for run_length in (1e6, 2e6):
        settings = Settings.load(None, **values, run_length=run_length)
        with started(settings) as (_, damaged):
            expected = float(run_length > 1e6)
            assert damaged("monitor") == expected
    assert len(list((tmp_path / "state").glob("monitor-*.damaged-*"))) == 1


def test_state_that_cannot_be_written_is_told_and_stops_nothing(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with started(settings) as (watch, _):
        fill(watch)
        monkeypatch.setattr(os, "fsync", refuse)
        watch.save()
        assert "cannot be written" in caplog.text
        monkeypatch.undo()
