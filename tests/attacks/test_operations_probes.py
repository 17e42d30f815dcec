"""The HTTP port: HEAD, slow and hostile clients, no DNS at the start, and metrics that a strict parser takes."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from guard.sidecar.host.health import ProbeServer
from guard.sidecar.policy import Decision, Outcome
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics
from guard.sidecar.transport import http_server

SECONDS = 30


@dataclass
class Shown:
    registry: CollectorRegistry
    reason: str | None = None


@pytest.fixture
def server() -> Iterator[ProbeServer]:
    shown = Shown(CollectorRegistry())
    Counter("guard_things", "Things.", registry=shown.registry).inc()
    with ProbeServer("127.0.0.1:0", shown, shown, lambda: True) as server:
        yield server


def ask(server: ProbeServer, method: str, path: str, **more: str) -> tuple[int, dict[str, str], bytes]:
    with closing(HTTPConnection(server.address, timeout=SECONDS)) as connection:
        connection.request(method, path, **more)  # type: ignore[arg-type] # a body
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()


def connect(server: ProbeServer) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def raw(server: ProbeServer, data: bytes) -> bytes:
    with connect(server) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(2**16):
            answer += part
        return answer


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/metrics?name[]=guard_things_total", "/nothing"])
def test_a_head_has_the_head_of_a_get_and_no_body(server: ProbeServer, path: str) -> None:
    status, headers, body = ask(server, "GET", path)
    assert body
    answer = raw(server, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert rest == b""
    assert head.startswith(f"HTTP/1.0 {status} ".encode())
    assert f"Content-Length: {headers['Content-Length']}".encode() in head.split(b"\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_other_methods_are_refused_and_told_which_there_are(server: ProbeServer, method: str) -> None:
    status, headers, _ = ask(server, method, "/metrics", body="x" * 100_000)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "request_",
    [b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n", b"\x16\x03\x01" + b"a" * 100 + b"\n\n",
     b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 2**20, b"GET " + b"/a" * 2**15 + b" HTTP/1.1\r\n\r\n"],
    ids=range(6),
)  # fmt: skip
def test_what_is_no_request_is_told_so_and_hurts_nobody(server: ProbeServer, request_: bytes) -> None:
    with suppress(ConnectionError):  # it was not read to its end
        assert raw(server, request_).startswith(b"HTTP/1.0 400 ")
    assert ask(server, "GET", "/healthz")[0] == 200


def test_clients_that_never_finish_their_request_hold_no_thread_and_no_place(server: ProbeServer) -> None:
    with ExitStack() as slow:
        for number in range(4 * http_server.MAX_CONNECTIONS):
            connection = slow.enter_context(connect(server))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: " if number % 2 else b"G")
        for path in ("/healthz", "/readyz", "/metrics"):
            assert ask(server, "GET", path)[0] == 200


def test_a_request_must_be_whole_within_a_time_however_steadily_it_trickles(
    server: ProbeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.2)

    def trickle() -> None:
        while True:
            connection.sendall(b"a")
            time.sleep(0.01)

    with connect(server) as connection, pytest.raises(ConnectionError):
        trickle()
    assert ask(server, "GET", "/healthz")[0] == 200


def test_clients_that_never_read_their_answer_hold_no_thread(server: ProbeServer) -> None:
    with ExitStack() as slow:
        for _ in range(2 * http_server.MAX_CONNECTIONS):
            slow.enter_context(connect(server)).sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert ask(server, "GET", "/readyz")[0] == 200


@pytest.mark.parametrize("address", ["0.0.0.0:0", "127.0.0.1:0", "[::]:0"])
def test_no_name_is_looked_up_to_listen(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a name is looked up")

    for name in ("getfqdn", "gethostbyaddr", "gethostbyname", "getnameinfo"):
        monkeypatch.setattr(socket, name, refuse)
    shown = Shown(CollectorRegistry())
    with ProbeServer(address, shown, shown, lambda: True) as server:
        assert server.address.startswith(address.rpartition(":")[0])


@pytest.mark.parametrize("scores", [[-5.0, -2.5, 0.0, 3.0], [float("nan"), 1.0], [-1.0], [1e30]])
def test_a_strict_parser_takes_the_whole_scrape(scores: list[float]) -> None:
    metrics = Metrics()
    of = metrics.of(Settings.model_construct(model_name="m"))
    values = np.array(scores, np.float32)
    flags = np.zeros(len(values), np.bool_)
    of.observe(Outcome(Decision.PASS, scores=values, flags=flags, triggers=("",) * len(values)), len(values), 0.01)
    of.p_values(np.linspace(0, 1, len(values)))
    text = generate_latest(metrics.registry).decode()  # type: ignore[no-untyped-call]
    read = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    families = {family.name: family for family in read}
    samples = {sample.name: sample.value for sample in families["guard_score"].samples}
    # An image that could not be scored has no score.
    assert samples["guard_score_count"] == np.isfinite(values).sum()
    assert samples["guard_score_sum"] >= 0
