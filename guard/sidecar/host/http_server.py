"""A small HTTP server on a thread of its own: slow clients hold a connection each, never a thread."""

import asyncio
import logging
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import formatdate
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
"""The most connections at a time. A further one takes the place of the oldest, which had more time than it needs."""
HEAD_SECONDS = 5.0
"""Seconds that a client may take for the head of its request."""
_WRITE_SECONDS = 10.0
"""Seconds that a client may take to read the answer."""
_END_SECONDS = 1.0
"""Seconds that a client is given to notice the end of the answer before its connection is reset."""
_LONGEST_HEAD = 2**14
_THREADS = 8
"""Threads that compute answers; some answers wait for an event loop, or for other processes."""
_READING = ("GET", "HEAD")
_JSON = ("Content-Type", "application/json")


class HttpServer:
    """Answers one request on each connection, as HTTP/1.0 does, until `close`.

    Args:
        listening: A bound stream socket, which is closed at the end.
        application: Computes the answers to GET; a HEAD gets the same head without the body.
    """

    def __init__(self, listening: socket.socket, application: "WSGIApplication") -> None:
        self._listening, self._application = listening, application
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="guard-http")
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._open: dict[asyncio.StreamWriter, None] = {}
        listening.listen(128)  # from here on, connections wait for the thread
        self._thread = threading.Thread(target=self._run, name="guard-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections and stop listening."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        # A loop of asyncio's own, whatever the sidecar runs on: this one must go on when that one hangs.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        start = asyncio.start_unix_server if self._listening.family == socket.AF_UNIX else asyncio.start_server
        server = await start(self._answer, sock=self._listening, limit=_LONGEST_HEAD)
        await self._stopping.wait()
        server.close()
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        self._open[writer] = None
        try:
            with suppress(TimeoutError, OSError):
                await self._exchange(reader, writer)
        finally:
            self._open.pop(writer, None)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                environ = await _read_head(reader)
        except ValueError:
            answer = _message("400 Bad Request", [], b"", with_body=False)
        else:
            answer = await self._loop.run_in_executor(self._pool, _respond, self._application, environ)
        # `drain` then waits until the kernel has taken all of it.
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(answer)
        async with asyncio.timeout(_WRITE_SECONDS):
            await writer.drain()
        # What a client still sends, such as a body, is read: otherwise its kernel might throw the answer away.
        writer.write_eof()
        async with asyncio.timeout(_END_SECONDS):
            while await reader.read(2**16):
                pass


async def _read_head(reader: asyncio.StreamReader) -> "WSGIEnvironment":
    """The head of a request.

    Raises:
        ValueError: It is not the head of an HTTP/1 request, or is longer than `_LONGEST_HEAD`.
    """
    lines, left = [], _LONGEST_HEAD
    while line := (await reader.readline()).decode("latin-1").rstrip("\r\n"):
        lines.append(line)
        if (left := left - len(line) - 2) < 0:
            raise ValueError
    method, target, version = lines[0].split(" ") if lines else ("", "", "")
    if not version.startswith("HTTP/1.") or not target.startswith("/"):
        raise ValueError
    path, _, query = target.partition("?")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    wanted = {"HTTP_ACCEPT": "accept", "HTTP_ACCEPT_ENCODING": "accept-encoding"}
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(path),
        "QUERY_STRING": query,
        **{key: headers[name] for key, name in wanted.items() if name in headers},
    }


def _respond(application: "WSGIApplication", environ: "WSGIEnvironment") -> bytes:
    """The whole answer to a request."""
    method = environ["REQUEST_METHOD"]
    if method not in _READING:
        body = b'{"error": "only GET and HEAD are answered"}\n'
        return _message("405 Method Not Allowed", [("Allow", ", ".join(_READING)), _JSON], body, with_body=True)
    head: list[tuple[str, list[tuple[str, str]]]] = []

    def start(status: str, headers: list[tuple[str, str]], _error: object = None) -> None:
        head.append((status, headers))

    try:
        # The same work for both, so that a HEAD has the status and the length that a GET would have.
        parts: Iterable[bytes] = application({**environ, "REQUEST_METHOD": "GET"}, start)  # type: ignore[arg-type] # nobody uses `write`
        body = b"".join(parts)
        status, headers = head[-1]
    except Exception:
        log.exception("a request over HTTP failed")
        status, headers, body = "500 Internal Server Error", [], b""
    return _message(status, headers, body, with_body=method == "GET")


def _message(status: str, headers: Iterable[tuple[str, str]], body: bytes, *, with_body: bool) -> bytes:
    fixed = (("Date", formatdate(usegmt=True)), ("Content-Length", str(len(body))), ("Connection", "close"))
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    lines = [f"HTTP/1.0 {status}", *(f"{name}: {value}" for name, value in (*kept, *fixed)), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body if with_body else b"")
