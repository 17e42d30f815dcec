import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from guard.classifiers import ExportedClassifier
from guard.classifiers.digest import ClassifierDigest
from guard.profiles import Profile
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Floats,
    Launcher,
    Reply,
    Sidecar,
    Upstream,
    connected,
    eventually,
    infer_request,
    refused_start,
)


@pytest.fixture(scope="module")
def shadow(launch: Launcher, exported: Path, served_profile: Path) -> Iterator[Sidecar]:
    with launch("--model", exported, "--profile", served_profile, "--mode", "shadow") as running:
        yield running


@pytest.fixture(scope="module")
def block(launch: Launcher, exported: Path, served_profile: Path) -> Iterator[Sidecar]:
    with launch("--model", exported, "--profile", served_profile, "--mode", "block") as running:
        yield running


@pytest.fixture(scope="module")
def flagged(classify: ExportedClassifier, profile: Profile, triggered: Floats) -> Floats:
    """Triggered images that are far above the threshold, by guard's own library."""
    detector, calibration = profile.detector(), profile.document.calibration
    assert calibration
    scores = detector.screen.score_samples(classify.run(triggered)[0]).values
    return triggered[scores > calibration.threshold.value + 0.05]


@pytest.fixture(scope="module")
def passed(classify: ExportedClassifier, profile: Profile, clean: Floats) -> Floats:
    detector, calibration = profile.detector(), profile.document.calibration
    assert calibration
    scores = detector.screen.score_samples(classify.run(clean)[0]).values
    return clean[scores < calibration.threshold.value - 0.05]


def test_shadow_mode_counts_and_leaves_the_reply_as_it_is(shadow: Sidecar, flagged: Floats, passed: Floats) -> None:
    before = {
        decision: shadow.metric("guard_images_total", model="classifier", decision=decision)
        for decision in ("flag", "pass")
    }
    with connected(shadow.address) as client:
        for images in (flagged[:1], np.concatenate([passed[:2], flagged[:1]])):
            reply = client.infer(infer_request(images))
            assert dict(reply.response.parameters) == {}
            assert reply.outputs == ["logits", "label"]
            assert not [key for key, _ in (*reply.initial, *reply.trailing) if key.startswith("guard")]
    assert shadow.metric("guard_images_total", model="classifier", decision="flag") == before["flag"] + 2
    assert shadow.metric("guard_images_total", model="classifier", decision="pass") == before["pass"] + 2
    assert shadow.metric("guard_requests_total", model="classifier", decision="flag", mode="shadow") == 2
    assert shadow.metric("guard_flagged_trigger_total", model="classifier", trigger="patch-1") == 2
    assert shadow.announced["models"][0]["failure_policy"] == "open"


def test_block_mode_refuses_and_names_the_rows(block: Sidecar, flagged: Floats, passed: Floats) -> None:
    with connected(block.address) as client:
        alone = client.refused(infer_request(flagged[:1]))
        assert alone.code() is grpc.StatusCode.PERMISSION_DENIED
        assert alone.details() == "guard: the input looks like a backdoor trigger"
        trailing = {item.key: item.value for item in alone.trailing_metadata()}
        assert trailing["guard-decision"] == "flag"
        assert float(trailing["guard-p-value"]) <= float(trailing["guard-alpha"])
        batch = np.concatenate([passed[:1], flagged[:1], passed[1:2], flagged[1:2]])
        error = client.refused(infer_request(batch))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error.details().endswith("(image 1, 3 of the batch)")
    assert block.metric("guard_refused_total", code="PERMISSION_DENIED") == 2


def test_block_mode_serves_and_tags_what_passes(block: Sidecar, passed: Floats) -> None:
    with connected(block.address) as client:
        reply = client.infer(infer_request(passed[:1]))
        assert (reply.decision, reply.parameter("guard_mode")) == ("pass", "block")


def test_without_screening_everything_is_unchecked_and_served(
    launch: Launcher, exported: Path, served_profile: Path, flagged: Floats
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--mode", "block", "--no-screening")
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        reply = client.infer(infer_request(flagged[:1]))
        assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "disabled")
        assert reply.outputs == ["logits", "label"]
        assert "guard_score" not in reply.response.parameters
        assert sidecar.metric("guard_unchecked_total", model="classifier", reason="disabled") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_request_in_flight_end(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, passed: Floats, number: signal.Signals
) -> None:
    arguments = (
        "--upstream",
        upstream.address,
        "--model",
        exported,
        "--profile",
        served_profile,
        "--drain-timeout",
        "60",
    )
    replies: list[Reply] = []
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        upstream.open.clear()
        caller = threading.Thread(target=lambda: replies.append(client.infer(infer_request(passed[:1]))))
        caller.start()
        eventually(lambda: bool(upstream.inferences()), "the request reaching the upstream server")
        sidecar.process.send_signal(number)
        eventually(lambda: "draining" in sidecar.stderr, "draining")
        assert sidecar.process.poll() is None
        upstream.open.set()
        caller.join(WAIT_SECONDS)
        assert [reply.decision for reply in replies] == ["pass"]
        assert sidecar.process.wait(WAIT_SECONDS) == 0


def test_further_signals_do_not_make_a_good_end_a_failure(
    launch: Launcher, exported: Path, served_profile: Path
) -> None:
    with launch("--model", exported, "--profile", served_profile) as sidecar:
        while sidecar.process.returncode is None:
            sidecar.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                sidecar.process.wait(0.005)
        assert sidecar.process.returncode == 0


@pytest.mark.parametrize("option", ["--listen", "--metrics"])
def test_a_taken_port_is_one_line_and_code_2(exported: Path, served_profile: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, lines = refused_start("--model", exported, "--profile", served_profile, option, address)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("guard: cannot ")
    assert address in lines[0]


def test_a_profile_of_another_model_is_one_line_and_code_4(exported: Path, profile: Profile, tmp_path: Path) -> None:
    model = profile.document.model
    parts = {**model.parts, "weights": "0" * 64}
    other = replace(model, parts=parts, digest=ClassifierDigest(parts).root)
    replace(profile, document=replace(profile.document, model=other)).save(tmp_path / "other")
    code, lines = refused_start("--model", exported, "--profile", tmp_path / "other")
    assert code == 4
    assert len(lines) == 1, lines
    assert "is of another model" in lines[0]


def test_a_profile_that_was_not_calibrated_is_one_line_and_code_4(
    exported: Path, profile: Profile, tmp_path: Path
) -> None:
    fresh = Profile(replace(profile.document, calibration=None), profile.triggers)
    fresh.save(tmp_path / "fresh")
    code, lines = refused_start("--model", exported, "--profile", tmp_path / "fresh")
    assert code == 4
    assert len(lines) == 1, lines
    assert "run guard calibrate" in lines[0]


def test_a_damaged_profile_is_one_line_and_code_4(exported: Path, profile_directory: Path) -> None:
    (profile_directory / "reference.safetensors").write_bytes(b"")
    code, lines = refused_start("--model", exported, "--profile", profile_directory)
    assert code == 4
    assert len(lines) == 1, lines
    assert "reference.safetensors" in lines[0]


def test_an_impossible_setting_is_one_line_and_code_2(served_profile: Path) -> None:
    code, lines = refused_start("--profile", served_profile)
    assert code == 2
    assert len(lines) == 1, lines
    assert "--model" in lines[0]
