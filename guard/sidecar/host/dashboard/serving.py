"""The page over HTTP: three static files, what they ask for as JSON, and one stream of events."""

import json
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from guard.sidecar.host.dashboard.access import Access, Refusal
from guard.sidecar.host.dashboard.feed import Feed
from guard.sidecar.host.dashboard.sources import Source
from guard.sidecar.transport.http_server import EventStream, HttpServer, bind

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

MAX_STREAMS = 16
"""The most open streams at a time; a further one is refused, and its browser tries again."""
_HTML, _JSON = "text/html; charset=utf-8", "application/json"
_FILES = {"page.js": "text/javascript; charset=utf-8", "page.css": "text/css; charset=utf-8"}
_CONTENT = {
    **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
    **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
    "img-src": "'self' data:",
}
_HEADERS = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "; ".join(f"{what} {whence}" for what, whence in _CONTENT.items())),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)


@contextmanager
def serve_dashboard(address: str, sources: Sequence[Source], access: Access) -> Iterator[str]:
    """Serve the page while the context is open, on a thread of its own.

    Args:
        address: HOST:PORT, where port 0 lets the system choose.
        sources: The sidecars that it shows.
        access: Who may open it.

    Yields:
        The address with the actual port.

    Raises:
        UsageError: The address is taken or not of this machine.
    """
    listening, actual = bind(address, "the dashboard")
    page = _Page(Feed(sources), access)
    server = HttpServer(listening, page.answer, streams=page.stream, companion=page.feed.run, tls=access.tls)
    try:
        yield actual
    finally:
        server.close()


class _Page:
    """Answers requests.

    Args:
        feed: What the page shows.
        access: Who may open it.
    """

    def __init__(self, feed: Feed, access: Access) -> None:
        self.feed, self._access = feed, access
        self._streams = 0
        folder = resources.files("guard.sidecar.host.dashboard") / "page"
        self._index = (folder / "index.html").read_bytes()
        self._files = {f"/{name}": ((folder / name).read_bytes(), kind) for name, kind in _FILES.items()}

    def answer(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Answer what is not a stream, as a WSGI application."""
        refusal = self._access.refusal(environ)
        found = None if refusal is not None else self._found(environ)
        if found is None:
            refusal = refusal or self._missing(environ["PATH_INFO"])
            body, kind = json.dumps({"error": refusal.reason}).encode(), _JSON
            status, more = refusal.status, refusal.headers
        else:
            (body, kind), status, more = found, HTTPStatus.OK, ()
        start_response(f"{status.value} {status.phrase}", [("Content-Type", kind), *more, *_HEADERS])
        return [body]

    def stream(self, environ: "WSGIEnvironment") -> EventStream | None:
        """The stream of events; None if the request is not for it, or is refused."""
        if environ["PATH_INFO"] != "/api/events" or self._access.refusal(environ) or self._streams >= MAX_STREAMS:
            return None
        return EventStream(_HEADERS, self._counted(environ.get("HTTP_LAST_EVENT_ID", "")))

    async def _counted(self, last: str) -> AsyncGenerator[bytes]:
        self._streams += 1
        try:
            async for event in self.feed.stream(last):
                yield event
        finally:
            self._streams -= 1

    def _found(self, environ: "WSGIEnvironment") -> tuple[bytes, str] | None:
        """Body and media type of an answer; None if there is nothing under the address."""
        path = environ["PATH_INFO"]
        if path == "/" or path.startswith("/record/"):
            return self._index, _HTML
        if path in self._files:
            return self._files[path]
        if path == "/api/overview":
            return self.feed.overview, _JSON
        if path == "/api/configuration":
            return json.dumps(self.feed.configuration()).encode(), _JSON
        if path == "/api/trigger.png":
            return self._picture(environ["QUERY_STRING"])
        if path.startswith("/api/evidence/"):
            event = self.feed.event(path.removeprefix("/api/evidence/"))
            return None if event is None else (json.dumps(event).encode(), _JSON)
        return None

    @staticmethod
    def _missing(path: str) -> Refusal:
        if path == "/api/events":
            return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_STREAMS} pages are open, and no more are served")
        return Refusal(HTTPStatus.NOT_FOUND, "there is nothing under this address")

    def _picture(self, query: str) -> tuple[bytes, str] | None:
        asked = {name: values[0] for name, values in parse_qs(query, max_num_fields=8).items()}
        number = asked.get("sidecar", "")
        if not number.isdecimal() or len(number) > 3:
            return None
        picture = self.feed.picture(int(number), asked.get("model", ""), asked.get("trigger", ""))
        return None if picture is None else (picture, "image/png")
