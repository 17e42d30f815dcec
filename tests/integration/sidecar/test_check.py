"""`guard serve --check` looks at everything that a start needs, and serves nothing."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guard.classifiers.digest import ClassifierDigest
from guard.diagnostics import Status
from guard.diagnostics.preflight import preflight
from guard.evidence import EVIDENCE_FILE
from guard.profiles import Profile
from guard.sidecar import Settings
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.telemetry.metrics import Metrics
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Launcher,
    Upstream,
    environment,
    free_port,
    refused_start,
)


def findings(**values: Any) -> dict[str, tuple[Status, str, int]]:
    """By subject; on ports that are free."""
    settings = Settings.load(None, **{"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", **values})
    return {found.subject: (found.status, found.detail, found.exit_code) for found in preflight(settings)}


def failed(found: dict[str, tuple[Status, str, int]]) -> dict[str, int]:
    return {subject: code for subject, (status, _, code) in found.items() if status is Status.FAILED}


def check(*arguments: str | Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "guard", "serve", "--check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=WAIT_SECONDS, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_sidecar_that_could_serve_is_code_0_and_nothing_is_written(
    exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    ports = ("--listen", f"127.0.0.1:{free_port()}", "--metrics", f"127.0.0.1:{free_port()}")
    arguments = ("--model", exported, "--profile", served_profile, "--state-dir", state, *ports)
    code, table, errors = check(*arguments)
    assert (code, errors) == (0, "")
    subjects = [
        "loop",
        "lock",
        "state",
        "profile",
        "model",
        "digest",
        "reference",
        "certificate",
        "calibration",
        "screening",
        "memory",
        "threads",
        "metrics",
        "listen",
    ]
    assert [line.split()[1] for line in table.splitlines()] == subjects
    code, text, _ = check(*arguments, "--json")
    document = json.loads(text)
    assert (code, document["ready"]) == (0, True)
    assert [found["subject"] for found in document["findings"]] == subjects
    assert not state.exists()


@pytest.mark.parametrize(
    ("policy", "status", "told"),
    [("closed", Status.FAILED, "every request would be refused"), ("open", Status.WARNING, "no request will pass")],
)
def test_a_verdict_that_is_not_good_enough_is_told_before_it_costs_requests(
    exported: Path, served_profile: Path, policy: str, status: Status, told: str
) -> None:
    found = findings(model=exported, profile=served_profile, require_vetted=True, failure_policy=policy)["profile"]
    assert found[0] is status
    assert 'the verdict on the model is "backdoored"' in found[1]
    assert told in found[1]


def test_every_failure_is_named_and_the_first_gives_the_code(
    exported: Path, served_profile: Path, tmp_path: Path, launch: Launcher
) -> None:
    with launch("--model", exported, "--profile", served_profile) as sidecar:
        taken = ("--listen", sidecar.address, "--metrics", str(sidecar.announced["metrics"]))
        code, text, errors = check("--model", tmp_path, "--profile", served_profile, *taken, "--json")
    assert (code, errors) == (4, "")
    document = json.loads(text)
    assert document["ready"] is False
    status = {found["subject"]: found["status"] for found in document["findings"]}
    assert [subject for subject, found in status.items() if found == "failed"] == ["model", "metrics", "listen"]


def test_a_configuration_that_is_wrong_is_one_line_and_code_2(served_profile: Path) -> None:
    code, lines = refused_start("--check", "--profile", served_profile)
    assert (code, len(lines)) == (2, 1)
    assert "--model" in lines[0]


def test_a_profile_of_another_model_fails_the_digest(exported: Path, profile: Profile, tmp_path: Path) -> None:
    parts = {**profile.document.model.parts, "weights": "0" * 64}
    other = replace(profile.document.model, parts=parts, digest=ClassifierDigest(parts).root)
    replace(profile, document=replace(profile.document, model=other)).save(tmp_path / "other")
    assert failed(findings(model=exported, profile=tmp_path / "other")) == {"digest": 4}


def test_a_profile_without_calibration_fails_and_one_that_is_missing_hides_nothing_else(
    exported: Path, profile: Profile, tmp_path: Path
) -> None:
    fresh = Profile(replace(profile.document, calibration=None), profile.triggers)
    fresh.save(tmp_path / "fresh")
    assert failed(findings(model=exported, profile=tmp_path / "fresh")) == {"calibration": 4}
    found = findings(model=exported, profile=tmp_path / "absent")
    assert failed(found) == {"profile": 4}
    assert found["model"][0] is Status.OK
    assert "digest" not in found


def test_state_and_certificates_that_cannot_be_used_fail(exported: Path, served_profile: Path, tmp_path: Path) -> None:
    (tmp_path / EVIDENCE_FILE).write_bytes(b"no database" * 100)
    values = {"model": exported, "profile": served_profile}
    status, told, _ = findings(**values, state_dir=tmp_path)["state"]
    assert status is Status.WARNING
    assert "a start moves it aside and begins anew" in told
    assert failed(findings(**values, state_dir=tmp_path / EVIDENCE_FILE / "inside")) == {"state": 2}
    absent = tmp_path / "absent.pem"
    assert failed(findings(**values, tls_certificate=absent, tls_key=absent)) == {"tls": 2}
    tls = {"upstream": "127.0.0.1:9", "upstream_tls": str(absent)}
    assert failed(findings(**values, **tls)) == {"upstream": 2}


@pytest.mark.parametrize(
    ("damaged", "content"),
    [
        ("profile/profile.json", b"{"),
        ("profile/triggers.safetensors", b"{"),
    ],
    ids=["profile", "triggers"],
)
def test_what_is_damaged_is_refused_by_a_check_as_by_a_start(
    exported: Path, served_profile: Path, tmp_path: Path, launch: Launcher, damaged: str, content: bytes
) -> None:
    shutil.copytree(served_profile, tmp_path / "profile")
    arguments = ("--model", exported, "--profile", tmp_path / "profile", "--state-dir", tmp_path / "state")
    with launch(*arguments):
        pass
    ports = ("--listen", f"127.0.0.1:{free_port()}", "--metrics", f"127.0.0.1:{free_port()}")
    assert check(*arguments, *ports)[0] == 0
    (file,) = tmp_path.glob(damaged)
    file.write_bytes(content)
    code, text, _ = check(*arguments, *ports, "--json")
    reasons = [found["detail"] for found in json.loads(text)["findings"] if found["status"] == "failed"]
    assert (code, [f"guard: {reason}" for reason in reasons]) == refused_start(*arguments)
    assert code == 4
    assert len(reasons) == 1


def test_the_monitor_state_of_every_process_is_looked_at(exported: Path, served_profile: Path, tmp_path: Path) -> None:
    values = {"model": exported, "profile": served_profile, "state_dir": tmp_path, "processes": 2}
    settings = Settings.load(None, **values)
    models = Models(Shared(settings, Workers(1, 1), Recorder(settings, Metrics(), read_only=True), 1), Metrics())
    models.save()
    (stored,) = tmp_path.glob("monitor-*.1.json")
    assert failed(findings(**values)) == {}
    stored.write_text("{")
    status, told, _ = findings(**values)["screening"]
    assert status is Status.WARNING
    assert "a start moves it aside and begins anew" in told
    assert stored.read_text() == "{"


@pytest.mark.parametrize("ready", [True, False])
def test_an_upstream_server_is_asked_whether_it_is_ready(
    exported: Path, served_profile: Path, upstream: Upstream, *, ready: bool
) -> None:
    upstream.ready = ready
    status, detail, _ = findings(model=exported, profile=served_profile, upstream=upstream.address)["upstream"]
    assert status is (Status.OK if ready else Status.WARNING)
    assert upstream.address in detail


def test_an_upstream_server_that_does_not_answer_is_a_warning(exported: Path, served_profile: Path) -> None:
    found = findings(model=exported, profile=served_profile, upstream=f"127.0.0.1:{free_port()}")
    assert found["upstream"][0] is Status.WARNING
    assert "UNAVAILABLE" in found["upstream"][1]
    assert failed(found) == {}


def test_a_loop_that_is_not_installed_fails_only_if_it_was_asked_for(
    exported: Path, served_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)  # as if it were not there
    values = {"model": exported, "profile": served_profile}
    assert findings(**values)["loop"] == (Status.OK, "asyncio", 0)
    found = findings(**values, event_loop="uvloop")
    assert failed(found) == {"loop": 2}
    assert "clip-guard[uvloop]" in found["loop"][1]


def test_json_is_for_the_check(exported: Path, served_profile: Path) -> None:
    code, lines = refused_start("--model", exported, "--profile", served_profile, "--json")
    assert (code, len(lines)) == (2, 1)
    assert "--check" in lines[0]


@pytest.mark.parametrize(
    ("values", "usable", "status"),
    [
        ({}, 4, Status.OK),
        ({"threads": 4}, 4, Status.OK),
        ({"threads": 5}, 4, Status.WARNING),
        ({"processes": 2, "threads": 4}, 4, Status.WARNING),
        ({"processes": 8}, 4, Status.OK),  # one thread each is the least
    ],
)
def test_more_threads_than_the_container_has_processors_are_a_warning(
    exported: Path,
    served_profile: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    usable: int,
    status: Status,
) -> None:
    for module in ("guard.diagnostics.preflight", "guard.sidecar.settings"):
        monkeypatch.setattr(f"{module}.usable_cpus", lambda: usable)
    found = findings(model=exported, profile=served_profile, **values)["threads"]
    assert found[0] is status
    assert f"of {usable} usable processors" in found[1]
