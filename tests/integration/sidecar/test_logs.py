"""The log of a sidecar: lines that a machine reads, with the request that they belong to and nothing that was in it."""

import json
import logging
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.sidecar.telemetry import logs
from tests.integration.sidecar.conftest import Floats, Launcher, connected, infer_request

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    return logging.LogRecord(
        "guard.test", logging.WARNING, __file__, 1, message, arguments, sys.exc_info() if error else None
    )


def as_json(entry: logging.LogRecord) -> dict[str, Any]:
    line = logs.JsonFormatter().format(entry)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_line_is_one_json_object_with_the_request_that_it_belongs_to() -> None:
    plain = as_json(record("%d of %d", 1, 2))
    assert datetime.fromisoformat(plain.pop("time")).utcoffset() is not None
    assert plain == {"level": "warning", "logger": "guard.test", "message": "1 of 2"}
    token = logs._origin.set(logs._NONE)
    try:
        logs.follow("order-66\n" + 500 * "x", TRACE)
        line = as_json(record("seen"))
        assert line["request_id"].startswith("order-66\n")
        assert len(line["request_id"]) == 128
        assert line["trace_id"] == TRACE
        text = logs.TextFormatter().format(record("seen"))
        assert "\n" not in text
        assert "request_id='order-66\\n" in text
    finally:
        logs._origin.reset(token)


def test_an_exception_is_one_field() -> None:
    try:
        int("two\nlines")
    except ValueError:
        entry = record("failed", error=True)
    line = as_json(entry)
    assert line["message"] == "failed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("base 10: 'two\\nlines'")
    assert logs.TextFormatter().format(entry).endswith("base 10: 'two\\nlines'")


@pytest.mark.parametrize("form", ["json", "text", None])
def test_a_sidecar_logs_in_the_form_that_was_asked_for(
    launch: Launcher, exported: Path, served_profile: Path, flagged: Floats, form: str | None
) -> None:
    arguments = ["--model", exported, "--profile", served_profile, "--run-length", "10000"]
    with (
        launch(*map(str, arguments), *(() if form is None else ("--log-format", form))) as sidecar,
        connected(sidecar.address) as client,
    ):
        # Enough of them raise an alarm, which is logged where the request is worked on.
        burst = np.concatenate([flagged] * (1 + 60 // len(flagged)))
        traced = (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),)
        client.infer(infer_request(burst, id="order-66"), metadata=traced)
    lines = sidecar.stderr.splitlines()
    alarm = next(line for line in lines if "attack in the stream" in line)
    assert all("order-66" not in line for line in lines if "draining" in line)
    if form == "text":
        assert alarm.endswith(f"[request_id='order-66' trace_id='{TRACE}']")
        return
    parsed = [json.loads(line) for line in lines]
    assert {"order-66"} == {line["request_id"] for line in parsed if "attack in the stream" in line["message"]}
    assert {TRACE} == {line["trace_id"] for line in parsed if "attack in the stream" in line["message"]}


@pytest.fixture(scope="module")
def flagged(classify: Any, profile: Any, triggered: Floats) -> Floats:
    images: Floats = triggered[profile.detector().score(classify.run(triggered)[0]).flags]
    return images


def test_nothing_of_an_input_is_logged_when_it_cannot_be_read(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats
) -> None:
    secret = b"do-not-write-this-anywhere"
    with launch("--model", exported, "--profile", served_profile) as sidecar, connected(sidecar.address) as client:
        client.refused(infer_request(clean[:1], raw_input_contents=[secret]))
        client.refused(secret)
    assert secret.decode() not in sidecar.stderr
