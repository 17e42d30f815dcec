"""Records, and waiting for what the writer says instead of for time."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guard.evidence import EvidenceWriter, Record, store, writer

WAIT = 30.0
"""Seconds after which a test fails; none waits for them to pass."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evidence.db"


@pytest.fixture
def record() -> Callable[..., Record]:
    """Makes records, the fields of which can be chosen."""

    def make(request_id: str = "request", **values: Any) -> Record:
        given: dict[str, Any] = {
            "model": "m",
            "model_digest": "sha256:00",
            "image": 0,
            "decision": "flag",
            "mode": "tag",
        }
        return Record(request_id, **{**given, **values})

    return make


@pytest.fixture
def fill(path: Path) -> Callable[..., None]:
    """Writes records to the log and closes it."""

    def write(*records: Record, **limits: Any) -> None:
        opened = EvidenceWriter(path, queue=max(1, len(records)), **limits)
        assert all(opened.record(item) for item in records)
        assert opened.close(WAIT)

    return write


class Messages(logging.Handler):
    """Lets a test wait for a message of the writer."""

    def __init__(self) -> None:
        super().__init__()
        self._events: dict[str, threading.Event] = {}

    def event(self, text: str) -> threading.Event:
        return self._events.setdefault(text, threading.Event())

    def emit(self, record: logging.LogRecord) -> None:
        for text, event in list(self._events.items()):
            if text in record.getMessage():
                event.set()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Messages]:
    """Messages of the writer, which tries again at once."""
    monkeypatch.setattr(writer, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(writer, "_MAX_DELAY", 0.01)
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.001)
    handler = Messages()
    writer.log.addHandler(handler)
    monkeypatch.setattr(writer.log, "level", logging.INFO)
    yield handler
    writer.log.removeHandler(handler)
