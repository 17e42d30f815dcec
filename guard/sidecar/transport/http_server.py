"""A small HTTP server on a thread of its own: slow clients hold a connection each, never a thread."""

import asyncio
import logging
import re
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from guard.errors import UsageError
from guard.sidecar.addresses import socket_path, split_address

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
_BUFFERED = 2**16
"""Bytes of events that wait for a client beyond what its kernel has taken."""
_READING = ("GET", "HEAD")
_HEADERS = ("accept", "accept-encoding", "authorization", "host", "last-event-id", "sec-fetch-site")
"""Headers that applications get."""
_ONCE = ("authorization", "host", "last-event-id", "sec-fetch-site")
"""Those of them that a request has once at most."""
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_JSON = ("Content-Type", "application/json")


@dataclass(frozen=True)
class EventStream:
    """An answer that goes on: server-sent events, each of them sent when it is there.

    Attributes:
        headers: Headers of the answer besides its media type.
        events: The events, as bytes to send; their end is the end of the answer.
    """

    headers: tuple[tuple[str, str], ...]
    events: AsyncGenerator[bytes]


class HttpServer:
    """Answers one request on each connection, as HTTP/1.0 does, until `close`.

    Args:
        listening: A bound stream socket, which is closed at the end.
        application: Computes the answers to GET; a HEAD gets the same head without the body.
        streams: The answer to a GET that goes on, computed on the server's own loop; None for what `application`
            answers. Whoever gives it bounds the number of streams.
        companion: Runs on the server's loop as long as the server does.
        tls: Context of TLS; None for plain HTTP.
    """

    def __init__(
        self,
        listening: socket.socket,
        application: "WSGIApplication",
        *,
        streams: "Callable[[WSGIEnvironment], EventStream | None]" = lambda _: None,
        companion: Callable[[], Coroutine[Any, Any, None]] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listening, self._application = listening, application
        self._streams, self._companion, self._tls = streams, companion, tls
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="guard-http")
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._open: dict[asyncio.Task[None], None] = {}
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
        companion = None if self._companion is None else asyncio.ensure_future(self._companion())
        await self._stopping.wait()
        if companion is not None:
            companion.cancel()
            with suppress(asyncio.CancelledError):
                await companion
        server.close()  # what still runs is cancelled with the loop

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = _this_task()
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        self._open[task] = None
        try:
            # It is cancelled when it is displaced and at the end of the server; asyncio would tell of an error.
            with suppress(TimeoutError, OSError, asyncio.CancelledError):
                await self._exchange(reader, writer)
        finally:
            self._open.pop(task, None)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._tls is not None:
            # Here and not before, so that those who do not get on with it count among the connections.
            await writer.start_tls(self._tls, ssl_handshake_timeout=HEAD_SECONDS)
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                environ = await _read_head(reader)
        except ValueError:
            answer = _message("400 Bad Request", [], b"", with_body=False)
        else:
            stream = self._streams(environ) if environ["REQUEST_METHOD"] in _READING else None
            if stream is not None and environ["REQUEST_METHOD"] == "GET":
                # It does not count among the connections, since it is old by nature and bounded elsewhere.
                self._open.pop(_this_task(), None)
                await self._flow(stream, reader, writer)
                return
            if stream is not None:
                answer = _head("200 OK", _stream_headers(stream))
            else:
                # Whoever is displaced while waiting for a thread gets no answer, so that a flood makes no work.
                answer = await self._loop.run_in_executor(self._pool, _respond, self._application, environ)
        # `drain` then waits until the kernel has taken all of it.
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(answer)
        async with asyncio.timeout(_WRITE_SECONDS):
            await writer.drain()
        # What a client still sends, such as a body, is read: otherwise its kernel might throw the answer away.
        if writer.can_write_eof():
            writer.write_eof()
        async with asyncio.timeout(_END_SECONDS):
            while await reader.read(2**16):
                pass

    async def _flow(self, stream: EventStream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send events until they end, or until the client is gone or does not read them."""
        writer.transport.set_write_buffer_limits(high=_BUFFERED)
        writer.write(_head("200 OK", _stream_headers(stream)))
        # A client that is gone is noticed at once, and not at the next event.
        gone, sending = asyncio.ensure_future(_read_to_the_end(reader)), _this_task()
        gone.add_done_callback(lambda _: sending.cancel())
        try:
            async with aclosing(stream.events) as events:
                async for event in events:
                    writer.write(event)
                    async with asyncio.timeout(_WRITE_SECONDS):
                        await writer.drain()
        finally:
            gone.cancel()


def _this_task() -> "asyncio.Task[None]":
    return cast("asyncio.Task[None]", asyncio.current_task())


async def _read_to_the_end(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        while await reader.read(2**16):
            pass


async def _read_head(reader: asyncio.StreamReader) -> "WSGIEnvironment":
    """The head of a request.

    Raises:
        ValueError: It is not the head of an HTTP/1 request, or is longer than `_LONGEST_HEAD`.
    """
    lines, left = [], _LONGEST_HEAD
    while (line := (await reader.readline()).decode("latin-1")) not in {"\n", "\r\n"}:
        if (left := left - len(line)) < 0 or not line.endswith("\n"):
            raise ValueError
        lines.append(line.rstrip("\r\n"))
    method, target, version = lines[0].split(" ") if lines else ("", "", "")
    if not version.startswith("HTTP/1.") or not target.startswith("/"):
        raise ValueError
    path, _, query = target.partition("?")
    headers: dict[str, str] = {}
    for name, colon, value in (line.partition(":") for line in lines[1:]):
        # A line that goes on with the last one, or a name with a space, is read differently elsewhere.
        if not colon or not _NAME.fullmatch(name) or (name.lower() in _ONCE and name.lower() in headers):
            raise ValueError
        headers[name.lower()] = value.strip()
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(path),
        "QUERY_STRING": query,
        **{f"HTTP_{name.upper().replace('-', '_')}": headers[name] for name in _HEADERS if name in headers},
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


def _stream_headers(stream: EventStream) -> list[tuple[str, str]]:
    return [("Content-Type", "text/event-stream"), *stream.headers, ("Connection", "close")]


def _message(status: str, headers: Iterable[tuple[str, str]], body: bytes, *, with_body: bool) -> bytes:
    fixed = (("Date", formatdate(usegmt=True)), ("Content-Length", str(len(body))), ("Connection", "close"))
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    return _head(status, [*kept, *fixed]) + (body if with_body else b"")


def _head(status: str, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.0 {status}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def bind(address: str, what: str) -> tuple[socket.socket, str]:
    """A socket that is bound to an address, for `HttpServer`; no name is looked up but one that the address holds.

    Args:
        address: HOST:PORT, where port 0 lets the system choose; or unix:PATH.
        what: What is served there, for the message of an error.

    Returns:
        The socket, and the address with the actual port.

    Raises:
        UsageError: The address is taken or not of this machine.
    """
    try:
        if (path := socket_path(address)) is not None:
            return _bound(socket.AF_UNIX, str(path)), address
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        (_, _, _, _, place), *_ = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
        bound = _bound(family, place)
    except OSError as error:
        raise UsageError(f"cannot serve {what} on {address}: {error.strerror or error}") from error
    shown = f"[{host}]" if ":" in host else host
    return bound, f"{shown}:{bound.getsockname()[1]}"


def _bound(family: int, place: Any) -> socket.socket:  # noqa: ANN401 - a path, or a tuple that depends on the family
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
    except OSError:
        listening.close()
        raise
    return listening
