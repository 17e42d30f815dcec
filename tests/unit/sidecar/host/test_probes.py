"""The HTTP server and its client, over a Unix socket."""

import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from guard.errors import UsageError
from guard.sidecar.host import health
from guard.sidecar.host.health import ProbeServer, probe

SECONDS = 30


@dataclass
class Shown:
    registry: CollectorRegistry
    reason: str | None = None


@pytest.fixture
def path() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "0.sock"


def test_a_socket_is_answered_at_as_a_port_is_and_is_gone_at_the_end(path: Path) -> None:
    shown = Shown(CollectorRegistry())
    Gauge("guard_ready", "Ready.", registry=shown.registry).set(1)
    with ProbeServer(f"unix:{path}", shown, shown, lambda: False) as server:
        assert server.address == f"unix:{path}"
        assert probe(path, "/readyz", seconds=SECONDS) == (200, b'{"ready": true}\n')
        shown.reason = "draining"
        assert probe(path, "/readyz", seconds=SECONDS) == (503, b'{"ready": false, "reason": "draining"}\n')
        assert probe(path, "/healthz", seconds=SECONDS)[0] == 503
        status, text = probe(path, "/metrics", seconds=SECONDS, accept="application/openmetrics-text")
        assert (status, text.splitlines()[-2:]) == (200, [b"guard_ready 1.0", b"# EOF"])
    assert not path.exists()
    with pytest.raises(OSError, match="No such file"):
        probe(path, "/readyz", seconds=SECONDS)


def test_a_socket_that_cannot_be_made_is_an_error_of_usage(path: Path) -> None:
    shown = Shown(CollectorRegistry())
    with pytest.raises(UsageError, match="cannot serve metrics on unix:"):
        ProbeServer(f"unix:{path.parent / 'absent' / '0.sock'}", shown, shown, lambda: True)


@pytest.mark.parametrize(
    ("answer", "error"),
    [(None, TimeoutError), (b"HTTP/1.0 200 OK\r\n\r\n" + b"a" * 100, ValueError), (b"hello", ValueError)],
)
def test_an_answer_that_does_not_come_or_is_too_long_or_none_of_http_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, error: type[Exception]
) -> None:
    monkeypatch.setattr(health, "_LONGEST_ANSWER", 64)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(answer or b"")

        thread = threading.Thread(target=serve)
        if answer is not None:
            thread.start()
        with pytest.raises(error):
            probe(path, "/metrics", seconds=0.2 if answer is None else SECONDS)
        if answer is not None:
            thread.join()
