"""Ways around a sidecar, opened one by one at a server in this process."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest

from guard.diagnostics import Finding, Status
from guard.diagnostics import exposure as module
from guard.diagnostics import rest as rest_module
from guard.diagnostics.exposure import exposures
from guard.diagnostics.rest import fetch
from guard.errors import UsageError
from guard.protocol.inference_pb2 import RepositoryIndexResponse
from guard.sidecar.transport.channels import Endpoint
from guard.testing import Fault, InferenceServer

OTHER = "127.0.0.2"
"""Stands for an address of this machine that others reach: who binds 127.0.0.1 is not there, who binds all is."""
Rest = Callable[..., int]


@pytest.fixture(autouse=True)
def _addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_machine_addresses", lambda: (OTHER,))


@pytest.fixture
def rest() -> Iterator[Rest]:
    """Starts HTTP servers that answer each path with a status and a body, anything else with 404; gives their port."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(answers: Mapping[str, tuple[int, Any]], host: str = "0.0.0.0") -> int:  # noqa: S104 - open on purpose
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, document = answers.get(self.path, (404, {"error": "not found"}))
                body = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        server = ThreadingHTTPServer((host, 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server.server_port

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[InferenceServer]:
    with InferenceServer({}) as running:
        yield running


def look(upstream: str, credentials: grpc.ChannelCredentials | None = None, **options: Any) -> dict[str, Finding]:
    endpoint = Endpoint(upstream, credentials)
    return {found.subject: found for found in exposures(endpoint, **{"rest_ports": (), **options})}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listing(*models: tuple[str, str]) -> bytes:
    reply = RepositoryIndexResponse()
    for name, state in models:
        reply.models.add(name=name, state=state)
    return reply.SerializeToString()


def test_a_server_on_loopback_that_offers_nothing_else_is_all_well(server: InferenceServer) -> None:
    found = exposures(Endpoint(server.address), known=("classifier",), rest_ports=(free_port(),))
    assert [each.subject for each in found] == ["transport", "grpc", "rest", "models", "memory"]
    assert {each.status for each in found} == {Status.OK}
    assert {each.method for each in server.received} == {"RepositoryIndex", "SystemSharedMemoryStatus"}


METADATA = {"name": "triton", "version": "2.60.0", "extensions": []}


@pytest.mark.parametrize(
    "answers",
    [
        {"/v2": (200, METADATA)},
        {"/v2/health/live": (200, b"")},
        {"/v2/health/live": (200, {"live": True})},
        {"/v1/models": (200, {"models": ["a"]})},
        {"/v1/models": (400, {"error": "Malformed request: GET /v1/models"})},
        {"/ping": (200, {"status": "Healthy"})},
    ],
    ids=["oip", "triton live", "kserve live", "kserve v1", "tensorflow", "torchserve"],
)
def test_rest_that_others_reach_is_a_warning(server: InferenceServer, rest: Rest, answers: Any) -> None:
    port = rest(answers)
    found = look(server.address, rest_ports=(free_port(), port))["rest"]
    assert found.status is Status.WARNING
    assert f"{OTHER}:{port}:" in found.detail
    assert "not screened" in found.detail


def test_a_repository_that_others_reach_is_a_warning_of_its_own(server: InferenceServer, rest: Rest) -> None:
    index = {"/v2/repository/index": (200, [{"name": "classifier", "state": "READY"}])}
    for answers, host, expected in (
        ({"/v2": (200, METADATA), **index}, "0.0.0.0", Status.WARNING),  # noqa: S104 - open on purpose
        ({"/v2": (200, METADATA), **index}, "127.0.0.1", Status.OK),
        ({"/v2": (200, METADATA), "/v2/repository/index": (403, {"error": "restricted"})}, "0.0.0.0", None),  # noqa: S104
    ):
        found = look(server.address, rest_ports=(rest(answers, host),)).get("repository")
        assert (found and found.status) == expected


def test_rest_on_loopback_is_not_a_warning(server: InferenceServer, rest: Rest) -> None:
    port = rest({"/v2": (200, METADATA)}, "127.0.0.1")
    found = look(server.address, rest_ports=(port,))["rest"]
    assert (found.status, f"127.0.0.1:{port}" in found.detail) == (Status.OK, True)


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"/v2": (200, {}), "/v2/health/live": (404, b"")},  # an image registry
        {"/v2": (200, b"<html>"), "/v2/health/live": (200, b"<html>"), "/ping": (200, b"pong")},
        {"/v2": (200, b"[" * 60_000)},
        {"/v2": (200, ["name", "version"])},
    ],
    ids=["nothing", "registry", "pages", "nested", "list"],
)
def test_other_http_servers_are_no_concern(server: InferenceServer, rest: Rest, answers: Any) -> None:
    assert look(server.address, rest_ports=(rest(answers),))["rest"].detail.startswith("no REST interface was found")


def test_only_the_beginning_of_a_body_is_read(rest: Rest) -> None:
    port = rest({"/": (200, b" " * 10**6)})
    assert fetch("127.0.0.1", port, "/") == (200, b" " * 2**16)


def test_a_server_that_sends_a_byte_now_and_then_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_module, "_MOST_SECONDS", 0.2)
    ended = threading.Event()

    def trickle() -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not ended.wait(0.02):
                connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=trickle)
        server.start()
        try:
            found = fetch("127.0.0.1", listening.getsockname()[1], "/v2")
        finally:
            ended.set()
            server.join()
    assert found is not None
    assert len(found[1]) < 100


def test_what_does_not_speak_http_is_no_rest(server: InferenceServer) -> None:
    assert fetch("127.0.0.1", int(server.address.rpartition(":")[2]), "/v2") is None


def test_a_grpc_port_that_is_open_elsewhere_too_is_a_warning() -> None:
    with InferenceServer({}, address="0.0.0.0:0") as server:
        port = server.address.rpartition(":")[2]
        found = look(f"127.0.0.1:{port}")["grpc"]
    assert found.status is Status.WARNING
    assert f"{OTHER}:{port} too" in found.detail


@pytest.mark.parametrize("own", [OTHER, "0.0.0.0"])  # noqa: S104 - an address in a configuration
def test_the_sidecars_own_port_is_no_way_around_it(server: InferenceServer, own: str) -> None:
    port = server.address.rpartition(":")[2]
    with InferenceServer({}, address=f"{OTHER}:{port}"):
        assert look(server.address)["grpc"].status is Status.WARNING
        assert look(server.address, own=("unix:/x", "127.0.0.1:0", f"{own}:{port}"))["grpc"].status is Status.OK


def test_an_address_that_is_not_loopback_is_one_that_others_reach(
    server: InferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_machine_addresses", tuple)
    assert look(server.address)["grpc"].status is Status.OK
    monkeypatch.setattr(module, "_is_loopback", lambda _: False)
    found = look(server.address)
    assert found["grpc"].status is Status.WARNING
    assert server.address in found["grpc"].detail


def test_a_server_elsewhere_without_tls_is_in_the_clear_and_the_rest_is_said_not_to_be_known(
    server: InferenceServer, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_is_loopback", lambda _: False)
    monkeypatch.setattr(module, "_is_local", lambda _: False)
    port = rest({"/v2": (200, METADATA)}, "127.0.0.1")
    found = look(server.address, rest_ports=(port,))
    assert found["transport"].status is Status.WARNING
    assert "in the clear" in found["transport"].detail
    assert found["grpc"].status is Status.OK
    assert "network policy" in found["grpc"].detail
    assert found["rest"].status is Status.WARNING
    assert f"127.0.0.1:{port}:" in found["rest"].detail
    assert look(server.address, credentials=grpc.ssl_channel_credentials())["transport"].status is Status.OK


@pytest.mark.parametrize(("mode", "status"), [(0o660, Status.OK), (0o666, Status.WARNING)])
def test_a_socket_that_everybody_can_connect_to_is_a_warning(mode: int, status: Status) -> None:
    # Nobody else can enter the folders that pytest makes.
    with TemporaryDirectory() as name, InferenceServer({}, address=f"unix:{name}/s"):
        folder, path = Path(name), Path(name, "s")
        folder.chmod(0o755)
        path.chmod(mode)
        found = look(f"unix:{path}")
        assert "grpc" not in found
        assert found["transport"].status is status
        assert f"mode {mode:o}" in found["transport"].detail
        folder.chmod(0o700)
        assert look(f"unix:{path}")["transport"].status is Status.OK


def test_a_socket_that_is_none_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "missing"):
        found = look(f"unix:{tmp_path / name}")
        assert (found["transport"].status, found["models"].status) == (Status.WARNING, Status.WARNING)


def test_models_without_a_profile_are_a_warning_and_few_are_named() -> None:
    names = ["classifier", "bad\x1b[2Jname", *(f"m-{index}" for index in range(9))]
    with InferenceServer(dict.fromkeys(names, dict)) as server:
        found = look(server.address, known=("classifier",))["models"]
        assert found.status is Status.WARNING
        assert "without a profile: 'bad\\x1b[2Jname', m-0, m-1, m-2, m-3 and 5 more;" in found.detail
        assert look(server.address, known=names)["models"].status is Status.OK
        unknown = look(server.address)["models"]
        assert (unknown.status, "without a configuration" in unknown.detail) == (Status.OK, True)


def test_models_that_are_not_loaded_are_counted_only() -> None:
    reply = listing(("a", "READY"), ("a", "UNAVAILABLE"), ("b", ""), ("c", "UNAVAILABLE"))
    with InferenceServer({}, methods={"RepositoryIndex": lambda _: [reply]}) as server:
        found = look(server.address, known=("a",))["models"]
    assert found.status is Status.OK
    assert found.detail.endswith("2 more are not loaded")


def test_a_list_that_cannot_be_read_is_a_warning_and_one_that_is_not_given_none() -> None:
    with InferenceServer({}, methods={"RepositoryIndex": lambda _: [b"\xff"]}) as server:
        assert look(server.address, known=("a",))["models"].status is Status.WARNING
    with InferenceServer({}, dialect="kserve") as server:
        found = look(server.address, known=("a",))["models"]
    assert (found.status, "UNIMPLEMENTED" in found.detail) == (Status.OK, True)


def test_shared_memory_is_a_warning_where_it_is_taken() -> None:
    def status(messages: Iterator[bytes]) -> Iterator[bytes]:
        next(messages)
        # Triton has the method whether or not shared memory is on; registering is what differs.
        server.fault = fault
        yield b""

    fault = Fault(grpc.StatusCode.INTERNAL, "no such region")
    names = ("SystemSharedMemoryStatus", "SystemSharedMemoryRegister")
    with InferenceServer({}, methods=dict.fromkeys(names, status)) as server:
        assert look(server.address)["memory"].status is Status.WARNING
        assert [each.data for each in server.received if each.method == names[1]] == [b""]
        for code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE):
            server.reset()
            fault = Fault(code)
            assert look(server.address)["memory"].status is Status.OK


def test_a_server_that_does_not_answer_is_said_once() -> None:
    found = look(f"127.0.0.1:{free_port()}", known=("a",))
    assert "memory" not in found
    assert (found["models"].status, "does not answer" in found["models"].detail) == (Status.WARNING, True)


def test_a_name_that_cannot_be_resolved_is_a_warning() -> None:
    for host in ("no-such-host.invalid", "x" * 70 + ".invalid"):
        (found,) = exposures(Endpoint(f"{host}:1"))
        assert (found.status, "cannot be resolved" in found.detail) == (Status.WARNING, True)


def test_an_address_of_no_form_is_refused() -> None:
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        exposures(Endpoint("nowhere"))


def test_the_addresses_of_this_machine_are_its_own_and_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for address in module._machine_addresses():
        assert not module._is_loopback(address)
        with socket.socket(module._family(address)) as probe:
            probe.bind((address, 0))
    assert not module._is_local("192.0.2.77")
