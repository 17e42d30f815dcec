"""Flagged requests in the form of OCSF, against the models of the schema in an environment of their own."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from guard.evidence import EVIDENCE_FILE, EvidenceWriter, Record
from tests.e2e.environments import environment
from tests.program import guard

TOOLS = Path(__file__).parent / "siem_tools"
COMMON = {"model": "classifier", "model_digest": "sha256:" + "0" * 64, "image": 0, "time": "2026-01-02T03:04:05.678Z"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / EVIDENCE_FILE
    writer = EvidenceWriter(path)
    records = (
        Record("first", decision="flag", mode="tag", decided_by="match patch-3", trigger="patch-3", target="cat",
               predicted="cat", reference="dog", p_value=0.001, alpha=0.01, scores={"divergence": 4.0},
               input_digest="1" * 64, trace_id="0af7651916cd43dd8448eb211c80319c", **COMMON),  # type: ignore[arg-type]
        Record("second", decision="flag", mode="block", scores={"score": float("nan")}, **COMMON),  # type: ignore[arg-type]
        Record("\N{GREEK SMALL LETTER PI} <script>", decision="pass", mode="shadow", second_look="withdrawn", **COMMON),  # type: ignore[arg-type]
    )  # fmt: skip
    assert all(writer.record(record) for record in records)
    assert writer.close(60)
    return path


def test_an_export_holds_valid_detection_findings(log: Path, tmp_path: Path) -> None:
    file = tmp_path / "findings.jsonl"
    done = guard("log", log, "--export", file, "--format", "ocsf")
    assert done.returncode == 0, done.stderr
    findings = {each["observables"][0]["value"]: each for each in map(json.loads, file.read_text().splitlines())}
    assert len(findings) == 3
    first, second = findings["first"], findings["second"]
    assert (first["class_uid"], first["type_uid"], first["severity"]) == (2004, 200401, "High")
    assert (first["disposition"], second["disposition"]) == ("Detected", "Blocked")
    assert first["time"] == datetime(2026, 1, 2, 3, 4, 5, 678000, UTC).timestamp() * 1000
    assert (first["unmapped"]["trigger"], first["unmapped"]["reference"]) == ("patch-3", "dog")
    assert second["unmapped"]["scores"] == {"score": None}
    tools = environment(TOOLS / "requirements.txt")
    checked = subprocess.run([tools, TOOLS / "check.py", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_form_of_siem_systems_is_one_of_lines(log: Path, tmp_path: Path) -> None:
    for more in ((), ("--export", tmp_path / "x.csv"), ("--follow",)):
        done = guard("log", log, "--format", "ocsf", *more)
        assert (done.returncode, "--format ocsf needs" in done.stderr) == (2, True)
