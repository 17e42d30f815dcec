"""Recording of flagged images, in the evidence log and for clients that follow the records."""

import asyncio
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guard import evidence
from guard.errors import EvidenceError, UsageError
from guard.evidence import EVIDENCE_FILE, Drop, Record
from guard.sidecar.decisions.state import open_folder
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_WAITING = 256
"""The most records that wait for one follower; it loses further ones, which are counted."""


class Follower:
    """New records for one reader on an event loop; at most `_WAITING` of them wait to be read.

    Args:
        wants: Whether the reader wants a record; called from any thread.
    """

    def __init__(self, wants: Callable[[Record], bool]) -> None:
        self._loop, self._wants = asyncio.get_running_loop(), wants
        self._waiting: deque[tuple[Record, int]] = deque()
        self._changed = asyncio.Event()
        self._lost, self._ended = 0, False

    def give(self, item: Record) -> None:
        """Add a record; may be called from any thread."""
        if self._wants(item):
            with suppress(RuntimeError):  # the loop is closed, and nobody reads
                self._loop.call_soon_threadsafe(self._put, item)

    def _put(self, item: Record) -> None:
        if len(self._waiting) >= _WAITING:
            self._lost += 1
            return
        self._waiting.append((item, self._lost))
        self._lost = 0
        self._changed.set()

    def end(self) -> None:
        """End the records; may be called from any thread."""
        with suppress(RuntimeError):  # the loop is closed, and nobody reads
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._ended = True
        self._changed.set()

    async def next(self) -> tuple[Record, int] | None:
        """The next record, and how many were lost just before it; None at the end."""
        while not self._waiting and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft() if self._waiting else None


class Recorder:
    """Records the evidence of one sidecar, without waiting for a disk or a reader.

    Args:
        settings: Settings of the sidecar.
        metrics: Metrics of the sidecar, where lost records are counted.
        read_only: Whether the evidence log is only checked, and no record will be written to it.

    Raises:
        EvidenceError: The evidence log can neither be opened nor begun anew; if it is only checked, it is damaged.
        UsageError: The folder cannot be written.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, read_only: bool = False) -> None:
        self._followers: tuple[Follower, ...] = ()
        self._changing = threading.Lock()
        self._path = None if settings.state_dir is None else settings.state_dir / EVIDENCE_FILE
        self._writer: evidence.EvidenceWriter | None = None
        if settings.state_dir is None:
            return
        if read_only:
            _check_folder(settings.state_dir)
            evidence.EvidenceWriter.check(settings.state_dir / EVIDENCE_FILE)
            return
        open_folder(settings.state_dir)
        self._writer = writer = evidence.EvidenceWriter(
            settings.state_dir / EVIDENCE_FILE,
            max_rows=settings.evidence_rows,
            max_bytes=settings.evidence_bytes,
            max_age_days=settings.evidence_days,
            on_drop=metrics.evidence_dropped,
            on_damage=lambda: metrics.state_damaged("evidence"),
            shared=settings.processes > 1,
        )
        metrics.evidence_trouble.set_function(lambda: float(writer.trouble is not None))

    @property
    def wanted(self) -> bool:
        """Whether records are written or followed at all."""
        return self._writer is not None or bool(self._followers)

    @property
    def trouble(self) -> Drop | None:
        """Why the evidence log cannot be written at present; None if it can be, or if there is none."""
        return None if self._writer is None else self._writer.trouble

    def record(self, item: Record) -> None:
        """Record a flagged image; may be called from any thread."""
        if self._writer is not None:
            self._writer.record(item)
        for follower in self._followers:
            follower.give(item)

    @contextmanager
    def followed(self, wants: Callable[[Record], bool] = lambda _: True) -> Iterator[Follower]:
        """Follow the records from now on; to be called on the event loop of the reader, whichever that is.

        Args:
            wants: Whether the reader wants a record; called from any thread.
        """
        follower = Follower(wants)
        # A new tuple, since workers may be iterating over the old one.
        with self._changing:
            self._followers = (*self._followers, follower)
        try:
            yield follower
        finally:
            with self._changing:
                self._followers = tuple(each for each in self._followers if each is not follower)

    def recent(self, number: int, wants: Callable[[Record], bool] = lambda _: True) -> list[Record]:
        """The newest records of the evidence log, oldest first; only those that can be read, if there is a log at all.

        Args:
            number: The most records; further back than twice as many nothing is looked for.
            wants: Whether a record is wanted.
        """
        if self._path is None or number == 0:
            return []
        found: list[Record] = []
        try:
            for record in evidence.EvidenceLog(self._path).records(limit=2 * number):
                found += [record] if wants(record) else []
        except EvidenceError as error:
            log.warning("not all records of the evidence log can be shown: %s", error)
        return found[:number][::-1]

    def end_followers(self) -> None:
        """End the records of all followers after those that already wait for them."""
        for follower in self._followers:
            follower.end()

    def close(self) -> bool:
        """Write the records that wait; return whether all of them were written."""
        return self._writer is None or self._writer.close()


def _check_folder(folder: Path) -> None:
    """Raise the error that making a folder would raise; one that exists is fine."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        code = errno.EEXIST if there == folder.absolute() else errno.ENOTDIR
    elif there != folder.absolute() and not os.access(there, os.W_OK | os.X_OK):
        code = errno.EACCES
    else:
        return
    raise UsageError(f"cannot write to {folder}: {os.strerror(code)}")
