"""`guard doctor`: what it looks at, and what it ends with."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from guard.cli import cli
from guard.diagnostics import exposure, installation
from guard.diagnostics.findings import Finding, Status
from guard.testing import InferenceServer

Run = Callable[..., tuple[int, dict[str, dict[str, str]]]]
OTHER = "127.0.0.2"


@pytest.fixture(autouse=True)
def _sound_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one is looked at in test_installation."""
    monkeypatch.setattr(installation, "packages", lambda: (Finding("serving", Status.OK, "click 8"),))
    monkeypatch.setattr(installation, "imports", lambda: Finding("imports", Status.OK, "fine"))
    monkeypatch.setattr(installation, "accelerators", lambda: (Finding("onnxruntime", Status.OK, "CPU"),))
    monkeypatch.setattr(exposure, "_machine_addresses", lambda: (OTHER,))
    monkeypatch.setattr(exposure, "REST_PORTS", ())


@pytest.fixture
def run() -> Run:
    """Runs `guard doctor --json`: its code, and its findings by subject."""

    def invoke(*arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
        result = CliRunner().invoke(cli, ["doctor", "--json", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        document = json.loads(result.stdout)
        assert document["healthy"] == (result.exit_code == 0)
        return result.exit_code, {found["subject"]: found for found in document["findings"]}

    return invoke


@pytest.fixture
def server() -> Iterator[InferenceServer]:
    with InferenceServer({"classifier": dict}) as running:
        yield running


@pytest.fixture
def config(tmp_path: Path, server: InferenceServer, exported: Path, profile_directory: Path) -> Path:
    """Of a sidecar before that server, on free ports."""
    return write(tmp_path, server.address, exported, profile_directory, "127.0.0.1:0", "127.0.0.1:0")


def write(folder: Path, upstream: str, model: Path, profile: Path, listen: str, metrics: str) -> Path:
    values = {"upstream": upstream, "model": model, "profile": profile, "listen": listen, "metrics": metrics}
    path = folder / "guard.toml"
    path.write_text("".join(f'{name} = "{value}"\n' for name, value in values.items()))
    return path


@pytest.fixture
def metrics() -> Iterator[HTTPServer]:
    """What a sidecar shows at its metrics port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"guard_requests_total 1\n")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_without_settings_it_looks_at_the_installation_only(run: Run) -> None:
    code, found = run()
    assert (code, list(found)) == (0, ["serving", "imports", "onnxruntime"])


def test_the_lines_are_those_of_serve_check() -> None:
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.stdout.splitlines()[0] == "ok       serving      click 8"


def test_an_address_alone_is_looked_at_for_ways_around(run: Run, server: InferenceServer) -> None:
    code, found = run("--upstream", server.address)
    assert (code, "classifier" in found["models"]["detail"]) == (0, True)
    assert "profile" not in found
    port = server.address.rpartition(":")[2]
    with InferenceServer({}, address=f"{OTHER}:{port}"):
        code, found = run("--upstream", server.address)
    assert (code, found["grpc"]["status"]) == (1, "warning")


def test_rest_ports_are_those_that_are_given(run: Run, server: InferenceServer, metrics: HTTPServer) -> None:
    _, found = run("--upstream", server.address, "--rest-port", metrics.server_port, "--rest-port", 1)
    assert f"ports {metrics.server_port}, 1 " in found["rest"]["detail"]


def test_a_configuration_brings_all_findings_of_serve_check(run: Run, config: Path) -> None:
    code, found = run("--config", config)
    # The profile says that the model is backdoored.
    assert code == 1
    assert found["profile"]["status"] == "warning"
    assert found["upstream"]["status"] == "ok"
    assert found["models"] == {
        "subject": "models", "status": "ok", "detail": "every model of the upstream server has a profile"
    }  # fmt: skip


def test_the_environment_is_a_configuration_too(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in config.read_text().splitlines():
        name, _, value = line.partition(" = ")
        monkeypatch.setenv(f"GUARD_{name.upper()}", value.strip('"'))
    monkeypatch.setenv("GUARD_MODEL_NAME", "other")
    code, found = run()
    assert code == 1
    assert "without a profile: classifier" in found["models"]["detail"]


def test_a_failure_ends_with_its_own_code(run: Run, config: Path, profile_directory: Path) -> None:
    (profile_directory / "profile.json").write_text("{}")
    code, found = run("--config", config)
    assert (code, found["profile"]["status"]) == (4, "failed")
    assert "models" in found


@pytest.mark.parametrize("content", [None, "nonsense = 1", "profile ="])
def test_a_configuration_that_cannot_be_used_is_a_finding(run: Run, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "guard.toml"
    if content is not None:
        path.write_text(content)
    code, found = run("--config", path)
    assert (code, found["settings"]["status"]) == (2, "failed")
    assert next(iter(found)) == "serving"


def test_an_address_of_no_form_is_a_finding(run: Run) -> None:
    code, found = run("--upstream", "nowhere")
    assert (code, "is not HOST:PORT" in found["settings"]["detail"]) == (2, True)


def test_certificates_that_cannot_be_read_are_a_finding(run: Run, config: Path, tmp_path: Path) -> None:
    config.write_text(f'{config.read_text()}upstream_tls = "{tmp_path / "none.pem"}"\n')
    code, found = run("--config", config)
    assert (code, found["transport"]["status"]) == (2, "failed")
    assert "none.pem" in found["transport"]["detail"]


def test_the_ports_of_a_running_sidecar_are_well_taken(
    run: Run, tmp_path: Path, server: InferenceServer, exported: Path, profile_directory: Path, metrics: HTTPServer
) -> None:
    shown = f"127.0.0.1:{metrics.server_port}"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listen = f"127.0.0.1:{listening.getsockname()[1]}"
        path = write(tmp_path, server.address, exported, profile_directory, listen, shown)
        code, found = run("--config", path)
        assert (code, found["listen"]["detail"]) == (1, f"{listen} is taken by a running sidecar")
        assert found["metrics"]["detail"] == f"{shown} is taken by a running sidecar"
        path.write_text(
            path.read_text().replace(f'listen = "{listen}"', f'listen = "127.0.0.1:0"\ndashboard = "{listen}"')
        )
        assert run("--config", path)[1]["dashboard"]["detail"] == f"{listen} is taken by a running sidecar"
        # Somebody else has the port.
        path = write(tmp_path, server.address, exported, profile_directory, listen, "127.0.0.1:0")
        code, found = run("--config", path)
        assert (code, found["listen"]["status"]) == (2, "failed")


def test_a_broken_installation_is_said_and_the_rest_is_not_tried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        return Finding("imports", Status.FAILED, "no grpc", 2)

    monkeypatch.setattr(installation, "imports", broken)
    code, found = run("--upstream", "127.0.0.1:1")
    assert (code, found["settings"]["status"]) == (2, "warning")
    assert "transport" not in found
