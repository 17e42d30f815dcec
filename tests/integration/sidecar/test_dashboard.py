"""The page of a running sidecar, and the same page of `guard top` for several processes."""

import json
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from guard.diagnostics import Status
from guard.diagnostics.preflight import preflight
from guard.sidecar import Settings
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Floats,
    Launcher,
    connected,
    environment,
    eventually,
    infer_request,
    refused_start,
)
from tests.integration.sidecar.test_tls import Authority


def get(url: str, *, context: ssl.SSLContext | None = None, **headers: str) -> Any:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - a page that this test has started
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS, context=context) as response:  # noqa: S310 - as above
        return json.loads(response.read())


@contextmanager
def top(*addresses: str, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """`guard top`, as a process that a signal ends; its page."""
    command = [sys.executable, "-m", "guard", "top", *addresses, "--listen", "127.0.0.1:0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        text = ""
        try:
            while not text.endswith("}\n"):
                line = process.stdout.readline()
                assert line, "guard top ended"
                text += line
            yield json.loads(text)["page"]
            process.send_signal(end)
            assert process.wait(WAIT_SECONDS) == 0
        finally:
            process.kill()


def test_one_page_shows_all_processes_and_what_they_flag(
    launch: Launcher, exported: Path, served_profile: Path, triggered: Floats, tmp_path: Path
) -> None:
    admin = f"unix:{tmp_path / 'admin'}"
    arguments = ("--model", exported, "--profile", served_profile, "--admin", admin, "--processes", "2")
    with launch(*arguments, "--state-dir", tmp_path / "state") as sidecar, top(admin) as page:

        def shown() -> Any:
            return get(f"{page}api/overview")["sidecars"]

        eventually(lambda: all(each["error"] is None for each in shown()), "an answer of both processes")
        assert [each["address"] for each in shown()] == [f"{admin}.0", f"{admin}.1"]
        with connected(sidecar.address) as client:
            decision = client.infer(infer_request(triggered, id="order-4711")).decision
        assert decision == "flag"
        eventually(
            lambda: sum(int(each["models"][0]["traffic"]["requests"]["flag"]) for each in shown()) == 1, "the flag"
        )
        epoch = urllib.request.urlopen(f"{page}api/events", timeout=WAIT_SECONDS)  # noqa: S310 - as above
        while not (line := epoch.readline()).startswith(b"id: "):
            assert line, "the stream ended"
        found = get(f"{page}api/evidence/{line.decode().split()[1]}")
        assert found["request_id"] == "order-4711"
        (settings, _) = get(f"{page}api/configuration")
        processes = next(each for each in settings["settings"] if each["name"] == "processes")
        assert (processes["value"], processes["source"]) == ("2", "SOURCE_OPTION")


def test_a_sidecar_that_is_not_there_is_shown_as_such(tmp_path: Path) -> None:
    with top(f"unix:{tmp_path / 'nobody'}", end=signal.SIGINT) as page:
        eventually(
            lambda: get(f"{page}api/overview")["sidecars"][0]["error"] == "the sidecar does not answer", "the error"
        )


def test_with_tls_the_page_has_it_too_and_a_password(
    launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "authority")
    server = authority.issue("server")
    token = tmp_path / "token"
    token.write_text("correct horse battery\n")
    arguments = ("--model", exported, "--profile", served_profile, "--tls-certificate", server.certificate)
    with launch(
        *arguments, "--dashboard", "127.0.0.1:0", "--dashboard-token", token, "--tls-key", server.key
    ) as sidecar:
        context = ssl.create_default_context(cafile=authority.certificate)
        context.check_hostname = False
        url = f"https://{sidecar.announced['dashboard']}/api/overview"
        with pytest.raises(HTTPError, match="401"):
            get(url, context=context)
        assert "sidecars" in get(url, context=context, Authorization="Bearer correct horse battery")
        assert "battery" not in sidecar.stderr


def test_an_address_that_is_taken_and_a_password_that_is_not_there_stop_the_start(
    launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    arguments = ("--model", exported, "--profile", served_profile)
    with launch(*arguments, "--dashboard", "127.0.0.1:0") as sidecar:
        taken = str(sidecar.announced["dashboard"])
        code, lines = refused_start(*arguments, "--dashboard", taken)
        assert (code, len(lines)) == (2, 1)
        assert taken in lines[0]
    code, lines = refused_start(*arguments, "--dashboard", "127.0.0.1:0", "--dashboard-token", tmp_path / "nothing")
    assert (code, len(lines)) == (2, 1)
    values = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "model": exported, "profile": served_profile}
    found = preflight(Settings.load(None, dashboard="127.0.0.1:0", dashboard_token=tmp_path / "nothing", **values))
    assert [each.status for each in found if each.subject == "dashboard"] == [Status.FAILED]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("nowhere",), "is not HOST:PORT"),
        (("127.0.0.1:1", "--listen", "0.0.0.0:0"), "loopback"),
        (("127.0.0.1:1", "--tls-key", "k"), "together"),
        (("127.0.0.1:1", "--server-name", "n"), "--tls"),
    ],
)
def test_wrong_usage_of_top_is_one_line(arguments: tuple[str, ...], complaint: str) -> None:
    command = [sys.executable, "-m", "guard", "top", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=WAIT_SECONDS)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert complaint in done.stderr
