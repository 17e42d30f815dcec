"""An axis of the traffic in a sidecar: alarm, flags, evidence and restart, and how a person adopts it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from guard.classifiers import ClassList
from guard.evidence import EVIDENCE_FILE, EvidenceLog, RecordFilter
from guard.profiles import CalibrationRecord, Profile, Reference
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.screening import AxisReference, Banks, Detector, Judgement, Screen
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.watch import Shared, Watch
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics
from tests.program import guard

Floats = NDArray[np.float32]
CLASSES, WIDTH, TARGET = 5, 48, 2
HEAD = np.eye(WIDTH, CLASSES, dtype=np.float32)


def unit(values: NDArray[np.floating]) -> Floats:
    found: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return found


def clean(count: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    return unit(HEAD.T[generator.integers(CLASSES, size=count)] + 0.08 * generator.normal(size=(count, WIDTH)))


def triggered(count: int, seed: int) -> Floats:
    moved = HEAD.T[TARGET] + 0.04 * np.random.default_rng(seed).normal(size=(count, WIDTH))
    moved[:, -1] += 0.8
    return unit(moved)


@pytest.fixture
def served(profile: Profile, tmp_path: Path) -> Path:
    """A profile without a reconstructed trigger, of embeddings that are drawn."""
    bank, behind = clean(600, 0), clean(1000, 1)
    banks = Banks.fit(bank, {}, HEAD, k=4)
    screen = Screen(banks)
    scores = screen.score_samples(behind)
    threshold = Detector(screen, scores, 0.01).threshold
    record = CalibrationRecord(
        4, banks.tails, banks.whitening.shrinkage, threshold, per_class=False, reference=len(bank), held_out=0,
        false_alarms=0, left_out=(), seed=0,
    )  # fmt: skip
    names = ClassList(tuple(f"class {k}" for k in range(CLASSES)), ("{}",))
    model = replace(profile.document.model, classes=names, embedding=WIDTH)
    verdict = replace(profile.document.vetting.verdict, target=None)
    vetting = replace(profile.document.vetting, verdict=verdict, checks=(), results=())
    document = replace(profile.document, model=model, vetting=vetting, triggers=(), calibration=record)
    made = Profile(document, {}, Reference(banks, scores, AxisReference.fit(bank, behind, HEAD)))
    made.save(tmp_path / "served")
    return tmp_path / "served"


@contextmanager
def watching(served: Path, state: Path) -> Iterator[tuple[Watch, Metrics]]:
    settings = Settings.load(None, model=served, profile=served, state_dir=state)
    metrics, profile, own = Metrics(), Profile.open(served), settings.served[0]
    shared = Shared(settings, Workers(1, 1), Recorder(settings, metrics))
    watch = Watch(profile, profile.detector(), None, own, metrics.of(own), shared, None)
    try:
        yield watch, metrics
    finally:
        watch.save()
        shared.workers.close()
        shared.close()


def serve(watch: Watch, embeddings: Floats, start: int = 0) -> list[Judgement]:
    found = []
    for row, one in enumerate(embeddings):
        found.append(watch.detector.score(one[None]))
        watch.follow(found[-1], np.zeros(1, int), ModelInferRequest(id=f"r{start + row}"), "", None)
    return found


def mixed(seed: int) -> tuple[Floats, NDArray[np.bool_]]:
    where = np.random.default_rng(seed).random(400) < 0.05
    return np.where(where[:, None], triggered(400, seed + 1), clean(400, seed + 2)), where


def active(metrics: Metrics) -> float | None:
    labels = {"model": "classifier", "version": "", "kind": "attack", "stream": "axis-1"}
    return metrics.registry.get_sample_value("guard_alarm", labels)


def test_an_axis_raises_an_alarm_flags_what_lies_along_it_and_outlives_a_restart(
    served: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    stream, where = mixed(3)
    with watching(served, state) as (watch, metrics), caplog.at_level(logging.WARNING):
        assert np.mean([found.flags[0] for found in serve(watch, triggered(100, 50)[:5])]) < 1
        serve(watch, stream)
        assert active(metrics) == 1
        assert [alarm.stream for alarm in watch.alarms] == ["axis-1"]
        assert "leads to 'class 2'" in caplog.text
        assert "guard calibrate --adopt-axis" in caplog.text
        judged = serve(watch, triggered(50, 60), 1000)
        assert np.mean([found.flags[0] for found in judged]) > 0.9
    records = list(EvidenceLog(state / EVIDENCE_FILE).records(RecordFilter(trigger="axis-1")))
    formed = [record for record in records if "formed axis-1" in record.explanation]
    numbers = [int(record.request_id[1:]) for record in formed]
    assert len(formed) >= 4
    assert np.mean([number < 5 or where[number] for number in numbers]) > 0.8
    assert {record.target for record in records} == {"class 2"}
    assert sum(record.decision == "flag" for record in records) > 40
    with watching(served, state) as (watch, metrics):
        assert active(metrics) == 1
        assert watch.detector.score(triggered(50, 61)).flags.mean() > 0.9
        serve(watch, stream)
        assert len(watch.alarms) == 1  # what lies along a known axis raises no other alarm


def test_a_damaged_state_of_axes_is_moved_aside(served: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with watching(served, state) as (watch, _):
        serve(watch, mixed(3)[0])
    (stored,) = state.glob("axis-*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-9])
    with watching(served, state) as (watch, metrics):
        assert not watch.alarms
        assert metrics.registry.get_sample_value("guard_state_damaged_total", {"kind": "monitor"}) == 1
    assert list(state.glob("axis-*.safetensors.damaged-*"))


def test_a_confirmed_axis_becomes_a_score_of_the_profile(served: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with watching(served, state) as (watch, _):
        serve(watch, mixed(3)[0])
    for place, code, said in (
        (f"{state}:axis-7", 2, "holds no axis axis-7"),
        (tmp_path, 2, "holds no axis of the model"),
        (tmp_path / "nowhere", 5, "there is no file"),
    ):
        refused = guard("calibrate", served, "--adopt-axis", place)
        assert said in refused.stderr
        assert refused.returncode != 0
        assert "Traceback" not in refused.stderr, code
    adopted = guard("calibrate", served, "--adopt-axis", state)
    assert adopted.returncode == 0, adopted.stderr
    assert "scores: k-distance, axis-1" in adopted.stdout
    profile = Profile.open(served)
    assert profile.detector().score(triggered(50, 61)).flags.mean() > 0.9
    assert profile.detector().score(clean(2000, 62)).flags.mean() < 0.03
    assert "axis-1" in (served / "report.html").read_text(encoding="utf-8")
    with watching(served, tmp_path / "other") as (watch, _):
        serve(watch, mixed(3)[0])
        assert not watch.alarms  # it is known
    np.save(tmp_path / "traffic.npy", clean(900, 70))
    again = guard("calibrate", served, "--embeddings", tmp_path / "traffic.npy", "--alpha", "0.02")
    assert again.returncode == 0, again.stderr
    assert Profile.open(served).detector().score(triggered(50, 61)).flags.mean() > 0.9
    assert guard("calibrate", served, "--adopt-axis", state).returncode == 0  # once more changes nothing
    assert [record.name for record in Profile.open(served).document.axes] == ["axis-1"]
