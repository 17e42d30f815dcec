"""Write an evidence log in a thread of its own, with bounded memory, so that it never delays requests."""

import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from guard.errors import DamagedLogError, EvidenceError, UsageError
from guard.evidence import store
from guard.evidence.clock import Clock
from guard.evidence.records import Drop, Record

log = logging.getLogger(__name__)

_BATCH = 256
"""Largest number of records in one transaction."""
_PRUNE_ROWS, _PRUNE_SECONDS = 256, 600.0
"""The limits are enforced after this many records or this many seconds, whichever comes first."""
_FIRST_DELAY, _MAX_DELAY = 0.5, 30.0
"""Seconds before a failed transaction is tried again; they double each time."""


_REASONS = {
    sqlite3.SQLITE_BUSY: Drop.LOCKED,
    sqlite3.SQLITE_LOCKED: Drop.LOCKED,
    sqlite3.SQLITE_CORRUPT: Drop.DAMAGED,
    sqlite3.SQLITE_NOTADB: Drop.DAMAGED,
    sqlite3.SQLITE_FULL: Drop.DISK_FULL,
}


class EvidenceWriter:
    """Writes records to a log; no trouble with the file reaches the caller.

    While the file cannot be written, records wait, up to the length of the queue, and the transaction is tried again
    with growing pauses; records that no longer fit are counted and lost. A file that was moved away is replaced by a
    new one, and so is one that is damaged or of another kind, which is moved aside whole. Several processes may write
    to one file.

    The limits are met to within `_PRUNE_ROWS` records or `_PRUNE_SECONDS`; the oldest records are deleted first. For
    their age, records are deleted only while the clock is plausible (`Clock`), and few at a time. SQLite keeps its
    write-ahead log, usually a few MiB, beside the file.

    Args:
        path: The file; created with mode 0600 if it is missing.
        max_rows: Largest number of records that are kept.
        max_bytes: Largest size of the file, at least 256 KiB.
        max_age_days: Longest time that a record is kept.
        queue: Largest number of records that wait to be written.
        on_drop: Called when records are lost, with the reason and their number; from any thread. It must not raise.
        on_damage: Called when a file that cannot be used was moved aside, from any thread. It must not raise.
        shared: Whether other processes write to the file. One that turns out to be damaged while it is written is then
            left in its place until the next start: SQLite would delete the write-ahead log of a new file when the
            others close the old one.

    Raises:
        EvidenceError: The file cannot be written or created. Only the constructor raises it; later trouble is counted.
        UsageError: A limit is out of range.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int = 100_000,
        max_bytes: int = 2**30,
        max_age_days: float = 90.0,
        queue: int = 1024,
        on_drop: Callable[[Drop, int], None] = lambda _reason, _number: None,
        on_damage: Callable[[], object] = lambda: None,
        shared: bool = False,
    ) -> None:
        for name, value, least in (
            ("max_rows", max_rows, 1),
            ("max_bytes", max_bytes, store.MIN_BYTES),
            ("queue", queue, 1),
        ):
            if value < least:
                raise UsageError(f"{name} of the evidence log must be at least {least}, not {value}")
        if not 0 < max_age_days <= 36_500:
            raise UsageError(f"max_age_days of the evidence log must lie between 0 and 36500, not be {max_age_days:g}")
        self._path, self._capacity, self._on_drop = path, queue, on_drop
        self._on_damage, self._shared = on_damage, shared
        store.renew(path, self._moved).dispose()
        self._max_rows, self._max_bytes, self._max_age_days = max_rows, max_bytes, max_age_days
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._lost_at_end = False
        self._trouble: Drop | None = None
        # Used by the thread only:
        self._connection: Connection | None = None
        self._file: store.Identity | None = None
        self._spoiled: store.Identity | None = None
        self._clock: Clock | None = None
        self._since_prune, self._next_prune = 0, monotonic()
        self._thread = threading.Thread(target=self._run, name="guard-evidence", daemon=True)
        self._thread.start()

    @staticmethod
    def check(path: Path) -> None:
        """Raise what the constructor would raise or move aside, without making or changing a file.

        Raises:
            DamagedLogError: The file would be moved aside.
            EvidenceError: A log cannot be written or made there.
        """
        try:
            store.check_place(path)
            if os.path.lexists(path):
                store.check(store.engine(path, "ro"), path)
        except EvidenceError as error:
            if store.is_damage(path, error):
                raise DamagedLogError(str(error)) from error
            raise

    @property
    def trouble(self) -> Drop | None:
        """Why the file cannot be written at present; None if it can be written."""
        return self._trouble

    def record(self, item: Record) -> bool:
        """Queue a record for writing.

        Never waits for the file, and never raises.

        Returns:
            Whether the record was queued; if not, it is counted as lost.
        """
        with self._changed:
            if self._closed:
                reason = Drop.CLOSED
            elif len(self._waiting) >= self._capacity:
                reason = self._trouble or Drop.QUEUE_FULL
            else:
                self._waiting.append(item)
                self._changed.notify()
                return True
        self._on_drop(reason, 1)
        return False

    def close(self, timeout: float = 5.0) -> bool:
        """Write the queued records, and accept no more.

        Args:
            timeout: Seconds to wait until they are written.

        Returns:
            Whether all of them were written in time.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive() and not self._lost_at_end

    def _run(self) -> None:
        delay, renewed = _FIRST_DELAY, False
        while True:
            with self._changed:
                pause = max(0.0, self._next_prune - monotonic())
                self._changed.wait_for(lambda: self._closed or self._waiting, timeout=pause)
                # They leave the queue only when they are written.
                batch = list(islice(self._waiting, _BATCH))
                closing = self._closed
                if closing and not batch:
                    break
            try:
                self._write(batch)
            except Exception as error:  # noqa: BLE001 - the thread must live as long as the sidecar
                self._disconnect()
                reason = self._note(error, batch)
                if reason is Drop.DAMAGED and closing and not self._shared and not renewed:
                    renewed = True  # the next try moves the file aside
                    continue
                if reason is not None and closing:
                    self._lose(reason, len(self._waiting))
                    break
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, timeout=delay)
                delay = min(2 * delay, _MAX_DELAY)
            else:
                delay = _FIRST_DELAY
        self._disconnect()

    def _write(self, batch: list[Record]) -> None:
        """Write records in one transaction, and enforce the limits when that is due."""
        connection = self._connect()
        # Before the batch, whose times are of the clock that is to be judged.
        clock = self._clock = self._clock or Clock(lambda before: store.newest(connection, before))
        if batch:
            store.add(connection, batch)
            self._forget(len(batch))
            self._since_prune += len(batch)
        if (
            monotonic() >= self._next_prune
            or self._since_prune >= min(_PRUNE_ROWS, max(1, self._max_rows // 8))
            or store.size(connection) > self._max_bytes
        ):
            age = self._max_age_days if clock.is_believed() else None
            store.prune(connection, max_rows=self._max_rows, max_bytes=self._max_bytes, max_age_days=age)
            self._since_prune, self._next_prune = 0, monotonic() + _PRUNE_SECONDS
        connection.rollback()  # a reading transaction left open would keep the write-ahead log from being reused
        if self._trouble is not None:
            self._trouble = None
            log.info("the evidence log %s can be written again", self._path)

    def _note(self, error: Exception, batch: list[Record]) -> Drop | None:
        """Log what went wrong, and drop records that another try would not save; the reason if another try may help."""
        self._next_prune = monotonic()  # pruning may be what failed, and it must not wait for the next record
        reason = _reason(error)
        self._spoiled = self._file if reason is Drop.DAMAGED else None
        if reason is None:
            unwritten = bool(batch) and bool(self._waiting) and self._waiting[0] is batch[0]
            self._lose(Drop.ERROR, len(batch) if unwritten else 0)
            log.error("records could not be written to the evidence log %s", self._path, exc_info=error)
        elif reason is not self._trouble:
            self._trouble = reason
            cause = error.orig if isinstance(error, DBAPIError) else error
            log.warning("the evidence log %s cannot be written (%s): %s", self._path, reason, cause)
        return reason

    def _moved(self, place: Path, error: EvidenceError) -> None:
        log.warning("%s; it was moved to %s, and a new one is begun", error, place.name)
        self._on_damage()

    def _lose(self, reason: Drop, number: int) -> None:
        if number:
            self._forget(number)
            self._lost_at_end |= self._closed
            self._on_drop(reason, number)

    def _forget(self, number: int) -> None:
        with self._changed:
            for _ in range(number):
                self._waiting.popleft()

    def _connect(self) -> Connection:
        """The connection to the file that is at the path now."""
        if self._connection is not None and (self._file is None or self._file != store.identity(self._path)):
            self._disconnect()
        if self._connection is None:
            renew = (
                store.prepare if self._shared else partial(store.renew, on_damage=self._moved, spoiled=self._spoiled)
            )
            engine = renew(self._path)
            # Before it is opened: a file that is moved away in between is then noticed at the next record.
            self._file = store.identity(self._path)
            self._connection = engine.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(DBAPIError):  # what cannot be rolled back was never written
                self._connection.close()
            self._connection = None


def _reason(error: Exception) -> Drop | None:
    """Why the file cannot be written; None if the error is of another kind, so that trying again would not help."""
    if isinstance(error, DBAPIError):
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code is None or not isinstance(error.orig, sqlite3.DatabaseError):
            return None
        known = _REASONS.get(code & 0xFF)
        return known or (Drop.ERROR if isinstance(error.orig, sqlite3.OperationalError) else None)
    if isinstance(error, (DamagedLogError, UnicodeDecodeError)):
        return Drop.DAMAGED
    if isinstance(error, EvidenceError):
        return _reason(error.__cause__) if isinstance(error.__cause__, Exception) else Drop.DAMAGED
    return Drop.ERROR if isinstance(error, OSError) else None
