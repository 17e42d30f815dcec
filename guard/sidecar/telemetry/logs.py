"""The log: a line for each event, as JSON or as text, with the request that it belongs to and never what is in that."""

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

_GRPC, _GONE = "grpc._cython.cygrpc", "ExecuteBatchError raised in core by servicer method"
_LONGEST_ID = 128
"""Characters of a client's request id that are written."""


@dataclass(frozen=True)
class Origin:
    """The request that is being worked on.

    Attributes:
        request_id: As the client gave it, or "".
        trace_id: Of the trace that it belongs to, or "".
    """

    request_id: str = ""
    trace_id: str = ""


_NONE = Origin()
_origin: ContextVar[Origin] = ContextVar("origin", default=_NONE)


def follow(request_id: str, trace_id: str) -> None:
    """Name the request that this task works on from now on; gRPC gives each call a task of its own."""
    _origin.set(Origin(request_id[:_LONGEST_ID], trace_id))


def origin() -> Origin:
    """The request that this task, or this thread on its behalf, works on."""
    return _origin.get()


def configure(form: Literal["json", "text"] | None, process: int | None = None) -> None:
    """Send the log of the process to standard error.

    Args:
        form: None for text on a terminal and JSON elsewhere.
        process: Which of several processes on one port this is; None if it is the only one.
    """
    handler = logging.StreamHandler()
    # gRPC reports a client that went away while it was answered as an error, with a traceback of its own code.
    handler.addFilter(lambda record: not (record.name == _GRPC and _GONE in record.getMessage()))
    as_text = sys.stderr.isatty() if form is None else form == "text"
    handler.setFormatter((TextFormatter if as_text else JsonFormatter)(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


class _Formatter(logging.Formatter):
    def __init__(self, process: int | None = None) -> None:
        super().__init__()
        self._process = process


class JsonFormatter(_Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`; the rest if there is any.

    That is `process` (of several), `request_id`, `trace_id`, `exception`.
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
    """The same for a person to read; a traceback takes lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback."""
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
