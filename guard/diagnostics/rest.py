"""Whether an inference server offers a REST interface at a port, found out with a few requests that change nothing."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import Any

_SECONDS, _MOST_SECONDS = 2.0, 6.0
"""Seconds for each step of a request, and for all of it."""
_MOST_BYTES = 2**16


def fetch(
    host: str, port: int, path: str, *, method: str = "GET", body: bytes | None = None
) -> tuple[int, bytes] | None:
    """Send a request over plain HTTP: status and beginning of the body, or None if there is no response."""
    with closing(HTTPConnection(host, port, timeout=_SECONDS)) as connection, suppress(OSError, HTTPException):
        connection.connect()
        with _ended(connection.sock, _MOST_SECONDS):
            connection.request(method, path, body, headers={"Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read(_MOST_BYTES)
    return None


@contextmanager
def _ended(connected: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection after some seconds: a server may send a byte now and then for ever."""
    timer = threading.Timer(seconds, connected.shutdown, (socket.SHUT_RDWR,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def lists_repository(host: str, port: int) -> bool:
    """Whether the server at this port lists its model repository over REST, as one does that lets clients load models.

    Triton and MLServer answer the question with POST; it changes nothing.
    """
    reply = fetch(host, port, "/v2/repository/index", method="POST", body=b"{}")
    return reply is not None and reply[0] == 200 and isinstance(_parsed(reply[1]), list)


def speaks(host: str, port: int) -> bool:
    """Whether an inference server answers at this port over REST."""
    for path, fits in _REST.items():
        reply = fetch(host, port, path)
        if reply is None:
            return False
        status, body = reply
        if fits(status, _parsed(body)):
            return True
    return False


def _parsed(body: bytes) -> Any:  # noqa: ANN401 - any JSON
    """Parse a JSON body: an empty body becomes an empty object, and a body that is not JSON an empty string."""
    try:
        return json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        return ""


def _is_server(status: int, document: Any) -> bool:  # noqa: ANN401 - as above
    """Whether this is the metadata of an Open Inference Protocol server."""
    return status == 200 and isinstance(document, Mapping) and {"name", "version"} <= set(document)


def _is_live(status: int, document: Any) -> bool:  # noqa: ANN401 - as above
    """Whether this is the liveness of such a server: the body of Triton is empty, that of MLServer may be null."""
    return status == 200 and (document in ({}, None) or (isinstance(document, Mapping) and "live" in document))


def _is_models(status: int, document: Any) -> bool:  # noqa: ANN401 - as above
    """Whether this is the model list of KServe's first protocol, or the error of TensorFlow Serving in its place."""
    if not isinstance(document, Mapping):
        return False
    return (status == 200 and isinstance(document.get("models"), list)) or str(document.get("error")).startswith(
        "Malformed request: GET /v1/models"
    )


def _is_ping(status: int, document: Any) -> bool:  # noqa: ANN401 - as above
    """Whether this is the health of TorchServe."""
    return status == 200 and isinstance(document, Mapping) and document.get("status") == "Healthy"


_REST = {"/v2": _is_server, "/v2/health/live": _is_live, "/v1/models": _is_models, "/ping": _is_ping}
