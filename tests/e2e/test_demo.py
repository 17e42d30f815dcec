"""`guard demo`, whole: what the README promises."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from guard.profiles import Profile


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "guard", "demo", "--out", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert str(folder / "report.html") in result.stdout
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "result.json").read_text())
    return document


def test_the_models_are_what_they_should_be(result: dict[str, Any]) -> None:
    assert min(result["accuracy"].values()) >= 0.93
    assert result["attack_success"]["backdoored"] >= 0.95
    assert result["attack_success"]["base"] <= 0.15
    assert result["attack_success"]["clean-twin"] <= 0.15


def test_the_backdoor_is_found_and_the_twin_is_not_accused(result: dict[str, Any]) -> None:
    assert result["verdicts"] == {"backdoored": "backdoored", "clean-twin": "no evidence"}
    assert result["targets"]["backdoored"] == result["true_target"] == "zero"


def test_triggered_requests_are_flagged_and_clean_ones_pass(result: dict[str, Any]) -> None:
    assert result["detected"]["total"] >= 500
    assert result["false_alarms"]["total"] >= 500
    assert result["detected"]["count"] / result["detected"]["total"] >= 0.95
    assert result["false_alarms"]["count"] / result["false_alarms"]["total"] <= 0.03
    assert result["failures"] == []
    assert any(line.startswith('guard_requests_total{decision="flag"') for line in result["metrics"])


def test_what_it_leaves_is_usable(out: Path) -> None:
    profile = Profile.open(out / "profiles" / "backdoored")
    assert profile.document.vetting.verdict.target == 0
    assert profile.document.vetting.reference_model.kind == "base"
    for name in ("base", "backdoored", "clean-twin"):
        with safe_open(out / "models" / name / "open_clip_model.safetensors", framework="np") as weights:
            assert len(list(weights.keys())) > 10
        recipe = json.loads((out / "models" / name / "training.json").read_text())["recipe"]
        assert bool(recipe and recipe["plants"]) == (name == "backdoored")
    text = (out / "report.html").read_text()
    assert "attacker’s trigger" in text
    assert "triggered requests" in text


def test_the_metrics_count_the_requests(result: dict[str, Any]) -> None:
    counts = {
        line.split('decision="')[1].split('"')[0]: float(line.split()[-1])
        for line in result["metrics"]
        if line.startswith("guard_requests_total")
    }
    # One more clean and one more triggered request opened the connections.
    assert sum(counts.values()) == result["detected"]["total"] + result["false_alarms"]["total"] + 2
    assert counts["unchecked"] == 0
