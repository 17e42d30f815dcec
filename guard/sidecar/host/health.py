"""Health and metrics of a sidecar, for gRPC clients, for Prometheus and for probes over HTTP."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from grpc_health.v1 import health, health_pb2
from prometheus_client import make_wsgi_app
from prometheus_client.registry import Collector

from guard.protocol import SERVICE
from guard.sidecar.addresses import socket_path
from guard.sidecar.telemetry.exposition import FAMILIES, encoded
from guard.sidecar.telemetry.metrics import Metrics
from guard.sidecar.transport.http_server import HttpServer, bind

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LOOP_SECONDS = 5.0
"""Seconds after which an event loop that does not answer counts as dead."""
_CHUNK, _LONGEST_ANSWER = 2**16, 2**24
"""The most bytes of another process's answer that are read at a time, and in total."""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_States = health_pb2.HealthCheckResponse


class Health:
    """Whether inference requests are served, kept in one place: grpc.health.v1, `guard_ready` and `/readyz` agree.

    In grpc.health.v1 the service "" says that the process is alive, and the inference service that requests are served.

    Args:
        metrics: Metrics of the sidecar, with `guard_ready`.

    Attributes:
        servicer: The health service, for a gRPC server.
        reason: Why inference requests are not served; None if they are.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.servicer = health.aio.HealthServicer()
        self.reason: str | None = "guard is starting"

    async def tell(self, reason: str | None) -> None:
        """Change the state.

        Args:
            reason: Why inference requests are not served; None if they are.
        """
        self.reason = reason
        self._metrics.ready.set(int(reason is None))
        await self.servicer.set("", _States.SERVING)
        await self.servicer.set(SERVICE, _States.SERVING if reason is None else _States.NOT_SERVING)

    async def drain(self) -> None:
        """Report permanently that no more requests should be sent."""
        await self.tell("guard is draining")
        await self.servicer.enter_graceful_shutdown()


class Exposed(Protocol):
    """An object with metrics."""

    @property
    def registry(self) -> Collector:
        """The registry that is exposed at `/metrics`."""


class Readiness(Protocol):
    """An object that knows whether inference requests are served."""

    @property
    def reason(self) -> str | None:
        """Why inference requests are not served; None if they are."""


class ProbeServer:
    """The HTTP port: `/metrics`, `/healthz` (the process is alive) and `/readyz` (inference requests are served).

    It has threads of its own, so that a slow scrape does not delay requests, and requests do not delay a scrape. Their
    number is bounded, and a client that is slow to ask or to read holds none of them.

    Args:
        address: HOST:PORT, where port 0 lets the system choose; or unix:PATH, whose folder decides who may connect.
        metrics: The metrics that `/metrics` exposes.
        health: What `/readyz` reports.
        alive: Whether the process is alive.

    Attributes:
        address: The address with the actual port.

    Raises:
        UsageError: The port is taken, the address is not of this machine, or the socket cannot be created.
    """

    def __init__(self, address: str, metrics: Exposed, health: Readiness, alive: Callable[[], bool]) -> None:
        self._socket = socket_path(address)
        listening, self.address = bind(address, "metrics")
        self._server = HttpServer(listening, _application(metrics.registry, health, alive))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)


def probe(path: Path, target: str, *, seconds: float, accept: str = "*/*") -> tuple[int, bytes]:
    """Ask the `ProbeServer` of another process that listens at a Unix socket.

    Args:
        path: The socket.
        target: `/metrics`, `/healthz` or `/readyz`.
        seconds: Seconds that the whole answer may take.
        accept: The media type to ask for.

    Returns:
        The status and the body.

    Raises:
        OSError: Nobody answers, or not in time (TimeoutError).
        ValueError: The answer is not valid HTTP, or is longer than 16 MiB.
    """
    deadline, answer = monotonic() + seconds, bytearray()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        connection.connect(str(path))
        # In HTTP 1.0, the end of the connection is the end of the answer.
        connection.sendall(f"GET {target} HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode())
        while part := connection.recv(_CHUNK):
            answer += part
            if len(answer) > _LONGEST_ANSWER:
                raise ValueError(f"the answer of {path} is longer than {_LONGEST_ANSWER} bytes")
            if (left := deadline - monotonic()) <= 0:
                raise TimeoutError(f"{path} did not answer within {seconds:g} s")
            connection.settimeout(left)
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    found = _STATUS.match(head)
    if found is None:
        raise ValueError(f"the answer of {path} is not valid HTTP")
    return int(found[1]), body


def loop_answers(loop: asyncio.AbstractEventLoop, seconds: float = LOOP_SECONDS) -> bool:
    """Whether an event loop runs a callback within some seconds; to be called from another thread."""
    answered = threading.Event()
    try:
        loop.call_soon_threadsafe(answered.set)
    except RuntimeError:  # the loop is closed
        return False
    return answered.wait(seconds)


def _application(registry: Collector, health: Readiness, alive: Callable[[], bool]) -> "WSGIApplication":
    exposition = make_wsgi_app(registry)

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if path == "/metrics" and environ.get("HTTP_ACCEPT") == FAMILIES:
            start_response("200 OK", [("Content-Type", FAMILIES)])
            return [encoded(registry)]
        if path == "/metrics":
            shown: Iterable[bytes] = exposition(environ, start_response)
            return shown
        if path == "/healthz":
            status, body = _state("alive", None if alive() else "the event loop does not answer")
        elif path == "/readyz":
            status, body = _state("ready", health.reason)
        else:
            status, body = HTTPStatus.NOT_FOUND, {"error": "there are /metrics, /healthz and /readyz"}
        start_response(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
        return [json.dumps(body).encode() + b"\n"]

    return answer


def _state(name: str, reason: str | None) -> tuple[HTTPStatus, dict[str, Any]]:
    if reason is None:
        return HTTPStatus.OK, {name: True}
    return HTTPStatus.SERVICE_UNAVAILABLE, {name: False, "reason": reason}
