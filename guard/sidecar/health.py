"""What a sidecar says about itself: to gRPC clients, to Prometheus, and to whoever probes it over HTTP."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from grpc_health.v1 import health, health_pb2
from prometheus_client import make_wsgi_app

from guard.errors import UsageError
from guard.sidecar.addresses import split_address
from guard.sidecar.metrics import Metrics
from guard.sidecar.service import SERVICE

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_LOOP_SECONDS = 5.0
"""After which an event loop that does not answer counts as dead."""
_CLIENT_SECONDS = 10
"""That a client of the HTTP port may take for its request."""
_States = health_pb2.HealthCheckResponse


class Health:
    """Whether inference requests are served, said in one place: grpc.health.v1, `guard_ready` and `/readyz` agree.

    In grpc.health.v1 the service "" says that the process lives, and the protocol's service that it can answer.

    Args:
        metrics: Where `guard_ready` is.

    Attributes:
        servicer: For the gRPC server.
        reason: Why requests are not served; None if they are.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.servicer = health.aio.HealthServicer()
        self.reason: str | None = "guard is starting"

    async def tell(self, reason: str | None) -> None:
        """Change what is said.

        Args:
            reason: Why requests are not served; None if they are.
        """
        self.reason = reason
        self._metrics.ready.set(int(reason is None))
        await self.servicer.set("", _States.SERVING)
        await self.servicer.set(SERVICE, _States.SERVING if reason is None else _States.NOT_SERVING)

    async def drain(self) -> None:
        """Say, for good, that no more requests should be sent."""
        await self.tell("guard is draining")
        await self.servicer.enter_graceful_shutdown()


class ProbeServer:
    """The HTTP port: `/metrics`, `/healthz` (the process lives) and `/readyz` (requests are served).

    It has threads of its own, so that neither waits for the other: a slow scrape for requests, or requests for it.

    Args:
        address: HOST:PORT; port 0 lets the system choose.
        metrics: Shown at `/metrics`.
        health: Shown at `/readyz`.
        alive: Whether the process lives.

    Raises:
        UsageError: The port is taken or the address not of this machine.
    """

    def __init__(self, address: str, metrics: Metrics, health: Health, alive: Callable[[], bool]) -> None:
        host, port = split_address(address)
        try:
            self._server = make_server(host, port, _application(metrics, health, alive), _server(host), _Handler)
        except OSError as error:
            raise UsageError(f"cannot serve metrics on {address}: {error.strerror}") from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def loop_answers(loop: asyncio.AbstractEventLoop, seconds: float = _LOOP_SECONDS) -> bool:
    """Whether an event loop, asked from another thread, runs what it is given."""
    answered = threading.Event()
    try:
        loop.call_soon_threadsafe(answered.set)
    except RuntimeError:  # it is closed
        return False
    return answered.wait(seconds)


def _application(metrics: Metrics, health: Health, alive: Callable[[], bool]) -> "WSGIApplication":
    exposition = make_wsgi_app(metrics.registry)

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if environ["REQUEST_METHOD"] != "GET":
            status, body = HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET is answered"}
        elif path == "/metrics":
            shown: Iterable[bytes] = exposition(environ, start_response)
            return shown
        elif path == "/healthz":
            lives = alive()
            status, body = _status(lives), _state("alive", None if lives else "the event loop does not answer")
        elif path == "/readyz":
            status, body = _status(health.reason is None), _state("ready", health.reason)
        else:
            status, body = HTTPStatus.NOT_FOUND, {"error": "there are /metrics, /healthz and /readyz"}
        start_response(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
        return [json.dumps(body).encode() + b"\n"]

    return answer


def _status(good: bool) -> HTTPStatus:  # noqa: FBT001 - a private helper of one argument
    return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE


def _state(name: str, reason: str | None) -> dict[str, Any]:
    return {name: reason is None} | ({} if reason is None else {"reason": reason})


def _server(host: str) -> type[WSGIServer]:
    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    return Server


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_SECONDS

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class's name
        """Not a line for each probe."""
