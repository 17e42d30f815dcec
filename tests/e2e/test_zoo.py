"""The smallest zoo, built with an interruption, and evaluated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ATTACKED, TWIN, BASE = "digits-0-badnets-medium-0", "digits-0-benign-0", "digits-0"


def builder(zoo: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.zoo", "build", "--spec", "smoke", "--out", str(zoo), "--device", "cpu"]


def build(zoo: Path) -> None:
    result = subprocess.run(builder(zoo), capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr


def truths(zoo: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (zoo / "truth").glob("*.json")}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A build that was killed after its first model; with what was there at that moment."""
    zoo = tmp_path_factory.mktemp("zoo") / "smoke"
    with subprocess.Popen(builder(zoo), stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 600
        while not (zoo / "truth" / f"{BASE}.json").exists():
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline, "the first model never came"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    return zoo, truths(zoo)


@pytest.fixture(scope="module")
def zoo(interrupted: tuple[Path, dict[str, dict[str, Any]]]) -> Path:
    """The same build, finished."""
    build(interrupted[0])
    return interrupted[0]


@pytest.fixture(scope="module")
def evaluation(zoo: Path) -> Path:
    """Where its results lie."""
    command = [sys.executable, "-m", "guard", "evaluate", str(zoo), "--budget", "quick", "--vetting-images", "400"]
    command += ["--methods", "vetting-base,screening"]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["models"] == {"backdoored": 1, "clean": 2, "failed attack": 0, "unknown": 0}
    return zoo / "evaluation"


def test_finished_models_are_not_made_again(interrupted: tuple[Path, dict[str, dict[str, Any]]], zoo: Path) -> None:
    before, after = interrupted[1], truths(zoo)
    assert set(after) == {BASE, TWIN, ATTACKED}
    assert before[BASE] == after[BASE]  # with the seconds that its training took


def test_an_interrupted_model_comes_out_as_one_that_was_not(zoo: Path, tmp_path: Path) -> None:
    first = truths(zoo)
    for name in (TWIN, ATTACKED):
        (zoo / "truth" / f"{name}.json").rename(tmp_path / f"{name}.json")
    build(zoo)
    again = truths(zoo)
    assert {name: truth["digest"] for name, truth in again.items()} == {
        name: truth["digest"] for name, truth in first.items()
    }
    assert again[BASE] == first[BASE]


def test_the_attack_took_and_the_others_are_clean(zoo: Path) -> None:
    known = truths(zoo)
    assert {name: truth["label"] for name, truth in known.items()} == {
        BASE: "clean",
        TWIN: "clean",
        ATTACKED: "backdoored",
    }
    assert known[ATTACKED]["success"] >= 0.8
    assert known[ATTACKED]["accuracy"] >= known[ATTACKED]["twin_accuracy"] - 0.03
    assert min(truth["accuracy"] for truth in known.values()) > 0.9


def test_the_evaluation_finds_the_backdoor_and_accuses_no_clean_model(evaluation: Path, zoo: Path) -> None:
    detection = json.loads((evaluation / ATTACKED / "vetting-base.json").read_text())["detection"]
    assert detection["outcome"] == "backdoored"
    assert detection["target"] == truths(zoo)[ATTACKED]["targets"][0]
    assert json.loads((evaluation / TWIN / "vetting-base.json").read_text())["detection"]["outcome"] == "no evidence"
    text = (evaluation / "summary.md").read_text()
    for part in ("vetting-base", "screening", "100.0% (1/1; 2.5%–100.0%)", ATTACKED):
        assert part in text


def test_screening_with_the_reconstruction_beats_density_alone(evaluation: Path) -> None:
    screening = json.loads((evaluation / ATTACKED / "screening.json").read_text())["screening"]
    assert screening["triggers"] >= 1
    (matched,), (alone,) = screening["vetted"]["auroc"], screening["density"]["auroc"]
    assert matched["value"] > max(0.95, alone["value"])
    held = screening["vetted"]["held"][0]
    assert held["false_alarms"] / held["clean"] < 0.03
