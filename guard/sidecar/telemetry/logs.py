"""The log: one line per event, as JSON or as text, with the ids of its request and never the request's contents."""

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

_GRPC_LOGGER = "grpc._cython.cygrpc"
_CLIENT_IS_GONE = "ExecuteBatchError raised in core by servicer method"
_LONGEST_ID = 128
"""The most characters of a client's request id that are logged."""


@dataclass(frozen=True)
class Origin:
    """The ids of the request that is being worked on.

    Attributes:
        request_id: The id that the client gave the request, or "".
        trace_id: The id of the trace that the request belongs to, or "".
    """

    request_id: str = ""
    trace_id: str = ""


_NONE = Origin()
_origin: ContextVar[Origin] = ContextVar("origin", default=_NONE)


def follow(request_id: str, trace_id: str) -> None:
    """Set the request that this task works on from now on; gRPC runs each call in a task of its own."""
    _origin.set(Origin(request_id[:_LONGEST_ID], trace_id))


def origin() -> Origin:
    """The request that this task works on, or this thread on behalf of a task."""
    return _origin.get()


def configure(form: Literal["json", "text"] | None, process: int | None = None) -> None:
    """Send the log of this process to standard error.

    Args:
        form: The format; None for text on a terminal and JSON elsewhere.
        process: The number of this process if several share a port; None if it is the only one.
    """
    handler = logging.StreamHandler()
    # If a client disconnects while it is answered, gRPC logs an error with a traceback of its own code.
    handler.addFilter(lambda record: not (record.name == _GRPC_LOGGER and _CLIENT_IS_GONE in record.getMessage()))
    as_text = sys.stderr.isatty() if form is None else form == "text"
    handler.setFormatter((TextFormatter if as_text else JsonFormatter)(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


class _Formatter(logging.Formatter):
    def __init__(self, process: int | None = None) -> None:
        super().__init__()
        self._process = process


class JsonFormatter(_Formatter):
    """One JSON object per line: `time`, `level`, `logger` and `message`, and where there are any the other fields.

    These are `process` (one of several), `request_id`, `trace_id` and `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        known = origin()
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": "" if self._process is None else str(self._process),
            "request_id": known.request_id,
            "trace_id": known.trace_id,
            "exception": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({key: value for key, value in line.items() if value}, ensure_ascii=False)


class TextFormatter(_Formatter):
    """The same as text for people; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, followed by the traceback if there is one."""
        known = origin()
        ids = [
            f"{name}={value!r}"
            for name, value in (
                ("process", self._process),
                ("request_id", known.request_id or None),
                ("trace_id", known.trace_id or None),
            )
            if value is not None
        ]
        text = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}"
        text += f" [{' '.join(ids)}]" if ids else ""
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
