"""Search an evidence log."""

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import ColumnElement, Select, func, select

from guard.errors import EvidenceError
from guard.evidence import store
from guard.evidence.records import Record, RecordFilter
from guard.evidence.store import table

_CHUNK = 200
_EQUAL = ("model", "decision", "predicted", "decided_by", "trigger", "request_id")


class EvidenceLog:
    """An evidence log, opened for reading only; a sidecar may go on writing it.

    Args:
        path: The file.

    Raises:
        EvidenceError: The file is missing, is not an evidence log, has another schema, or cannot be read. Every
            method raises it too, if the file turns out to be damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._engine = path, store.engine(path, "ro")
        store.check(self._engine, path)
        try:
            with self._engine.connect() as connection:
                self._columns = store.columns(connection)
        except store.FAILURES as error:
            raise store.unusable(path, error) from error

    def count(self, wanted: RecordFilter | None = None) -> int:
        """The number of records that meet a filter, or of all records without one."""
        return self._number(select(func.count()).select_from(table).where(*self._conditions(wanted)))

    def records(
        self, wanted: RecordFilter | None = None, *, limit: int | None = None, offset: int = 0
    ) -> Iterator[Record]:
        """The records that meet a filter, newest first.

        They are read a few hundred at a time, so that a long export neither fills the memory nor blocks the sidecar.
        Records that are written or deleted meanwhile may or may not be among them.

        Args:
            wanted: The filter; None for all records.
            limit: Largest number of records; None for all.
            offset: How many of the newest records to skip.
        """
        query = select(*self._columns.values()).where(*self._conditions(wanted)).order_by(table.c.id.desc())
        left, last = limit, None
        while left is None or left > 0:
            chunk = self._fetch(
                (query.offset(offset) if last is None else query.where(table.c.id < last)).limit(
                    _CHUNK if left is None else min(_CHUNK, left)
                )
            )
            if not chunk:
                return
            yield from chunk
            last = chunk[-1].id
            left = None if left is None else left - len(chunk)

    def after(self, identity: int, wanted: RecordFilter | None = None) -> list[Record]:
        """Up to a few hundred records that were written after a given record and meet a filter, oldest first.

        Args:
            identity: Id of the given record; 0 to start with the oldest.
            wanted: The filter; None for all records.
        """
        query = (
            select(*self._columns.values()).where(*self._conditions(wanted), table.c.id > identity).order_by(table.c.id)
        )
        return self._fetch(query.limit(_CHUNK))

    @property
    def newest(self) -> int:
        """Id of the newest record; 0 if there is none."""
        return self._number(select(func.coalesce(func.max(table.c.id), 0)))

    def get(self, identity: int) -> Record:
        """The record with an id.

        Raises:
            EvidenceError: There is no record with this id.
        """
        # SQLite's integers have 64 bits.
        if not 0 < identity < 2**63 or not (
            found := self._fetch(select(*self._columns.values()).where(table.c.id == identity))
        ):
            raise EvidenceError(f"the evidence log {self._path} has no record {identity}; it may have been deleted")
        return found[0]

    def _number(self, query: Select[int]) -> int:
        try:
            with self._engine.connect() as connection:
                return connection.execute(query).scalar_one()
        except store.FAILURES as error:
            raise store.unusable(self._path, error) from error

    def _fetch(self, query: Select[tuple[object, ...]]) -> list[Record]:
        try:
            with self._engine.connect() as connection:
                return [store.to_record(row) for row in connection.execute(query)]
        except store.FAILURES as error:
            raise store.unusable(self._path, error) from error

    def _conditions(self, wanted: RecordFilter | None) -> list[ColumnElement[bool]]:
        if wanted is None:
            return []
        columns = self._columns
        found = [columns[name] == value for name in _EQUAL if (value := getattr(wanted, name)) is not None]
        if wanted.since is not None:
            found.append(columns["time"] >= wanted.since)
        if wanted.until is not None:
            found.append(columns["time"] < wanted.until)
        if wanted.p_value is not None:
            found.append(columns["p_value"] <= wanted.p_value)
        return found
