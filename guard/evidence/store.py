"""The database of an evidence log: its schema, and how it is opened, filled and kept within its limits."""

import errno
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import TypeAdapter
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    NullPool,
    Row,
    Table,
    Text,
    create_engine,
    delete,
    func,
    insert,
    select,
)
from sqlalchemy.exc import DatabaseError

from guard.errors import EvidenceError
from guard.evidence.records import Record, rfc3339

SCHEMA = 1
APPLICATION = int.from_bytes(b"grdE")
"""Marks the file as an evidence log, in the header field that SQLite reserves for this purpose."""
MIN_BYTES = 2**18
BUSY_SECONDS = 2.0
"""How long a statement waits for another process."""
_MAX_LENGTH = 2**20
"""Largest value that is read, in bytes: a log that was tampered with must not fill the memory."""
_KEEP = 0.9
"""Share of the allowed size that remains when the oldest records are deleted for it."""

_NUMBERS = TypeAdapter(dict[str, float | None])
"""Scores and thresholds, which are stored as JSON; a number that is not finite as null."""

_PRAGMAS = (
    "PRAGMA trusted_schema = OFF",
    "PRAGMA synchronous = NORMAL",
    f"PRAGMA journal_size_limit = {4 * 2**20}",
)

table = Table(
    "records",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("time", Text, nullable=False, index=True),
    *(Column(name, Text, nullable=False) for name in ("request_id", "trace_id", "model", "model_digest")),
    Column("image", Integer, nullable=False),
    *(Column(name, Text, nullable=False) for name in ("decision", "mode", "predicted")),
    Column("p_value", Float),
    Column("alpha", Float),
    *(
        Column(name, Text, nullable=False)
        for name in ("scores", "thresholds", "trigger", "target", "second_look", "explanation", "input_digest")
    ),
    # Last, so that a search reads no pictures.
    Column("thumbnail", LargeBinary),
    # An id is never given twice, also after the newest records were deleted.
    sqlite_autoincrement=True,
)


def engine(path: Path, mode: Literal["ro", "rw"]) -> Engine:
    """Connections to an existing file, each opened when it is needed and closed after use."""

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_LENGTH)
            for pragma in _PRAGMAS:
                connection.execute(pragma)
        except sqlite3.Error:  # the file is damaged
            connection.close()
            raise
        return connection

    # Values that clients sent do not belong in error messages.
    return create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)


def check(engine: Engine, path: Path) -> None:
    """Make sure that a file is an evidence log that this guard can use.

    Raises:
        EvidenceError: It is not an evidence log, is damaged, has another schema, or cannot be opened.
    """
    if not path.is_file():
        raise EvidenceError(f"there is no evidence log {path}")
    try:
        with engine.connect() as connection:
            application, schema = _pragma(connection, "application_id"), _pragma(connection, "user_version")
            if application != APPLICATION:
                raise EvidenceError(f"{path} is not an evidence log; give another file, or move this one away")
            if schema != SCHEMA:
                raise EvidenceError(
                    f"the evidence log {path} has schema {schema}, this guard knows {SCHEMA}; "
                    f"use {'a newer' if schema > SCHEMA else 'the older'} guard, or give another file"
                )
            connection.execute(select(table).order_by(table.c.id.desc()).limit(1)).all()
    except DatabaseError as error:
        raise unusable(path, error) from error


def unusable(path: Path, error: DatabaseError) -> EvidenceError:
    """The error for a log on which the database failed."""
    return EvidenceError(
        f"the evidence log {path} is damaged, is not an evidence log, or cannot be opened ({error.orig}); "
        "check its permissions, or move it away"
    )


def prepare(path: Path) -> Engine:
    """Open an evidence log for writing, and create it if there is none.

    A new log is created beside its place and then linked into it, so that processes that start together find either no
    log or a complete one. Its mode is 0600.

    Raises:
        EvidenceError: As for `check`, or the log cannot be created.
    """
    check_place(path)
    try:
        if not path.exists():
            _create(path)
    except OSError as error:
        raise EvidenceError(f"cannot write the evidence log {path}: {error.strerror}") from error
    except DatabaseError as error:
        raise EvidenceError(f"cannot create the evidence log {path}: {error.orig}") from error
    opened = engine(path, "rw")
    check(opened, path)
    return opened


def check_place(path: Path) -> None:
    """Make sure that an evidence log can be written, or made in its folder where there is none.

    Raises:
        EvidenceError: Neither is possible.
    """
    # SQLite itself would open a file that it cannot write for reading, and say so only later.
    place = path if path.is_file() else path.parent
    if place.exists() and not os.access(place, os.W_OK):
        raise EvidenceError(f"cannot write the evidence log {path}: {os.strerror(errno.EACCES)}")


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        new = Path(directory) / "log"
        new.touch(0o600)
        made = engine(new, "rw")
        with made.connect() as connection:
            for name, value in (
                # Before anything is written: it cannot be changed later.
                ("auto_vacuum", "INCREMENTAL"),
                ("journal_mode", "WAL"),
                ("application_id", APPLICATION),
                ("user_version", SCHEMA),
            ):
                connection.exec_driver_sql(f"PRAGMA {name} = {value}")
            table.metadata.create_all(connection)
            connection.commit()
        with suppress(FileExistsError):  # another process created the same file first
            path.hardlink_to(new)


def add(connection: Connection, records: Sequence[Record]) -> None:
    """Write records in one transaction."""
    rows = []
    for record in records:
        row = record.document()
        del row["id"]
        for name in ("scores", "thresholds"):
            row[name] = json.dumps(row[name])
        rows.append({**row, "thumbnail": record.thumbnail})
    connection.execute(insert(table), rows)
    connection.commit()


def to_record(row: Row[Any]) -> Record:
    """The record in a row of the table.

    Raises:
        EvidenceError: The row contains values that guard never writes.
    """
    values = dict(row._mapping)  # noqa: SLF001 - the documented name
    try:
        for name in ("scores", "thresholds"):
            numbers = _NUMBERS.validate_json(values[name])
            values[name] = {score: math.nan if value is None else value for score, value in numbers.items()}
        return Record(**{**values, "image": int(values["image"])})
    except (AttributeError, TypeError, ValueError) as error:
        raise EvidenceError(f"record {values['id']} of the evidence log is damaged") from error


def size(connection: Connection) -> int:
    """Size of the database in bytes, with free pages, but without the write-ahead log."""
    return _pragma(connection, "page_count") * _pragma(connection, "page_size")


def prune(connection: Connection, *, max_rows: int, max_bytes: int, max_age_days: float) -> None:
    """Delete the oldest records beyond the limits, and give their space back to the file system."""
    oldest = rfc3339(datetime.now(UTC) - timedelta(days=max_age_days))
    deleted = connection.execute(delete(table).where(table.c.time < oldest)).rowcount
    rows = _count(connection)
    deleted += _delete_oldest(connection, rows - max_rows)
    connection.commit()
    if deleted:
        _shrink(connection)
    while (now := size(connection)) > max_bytes and (rows := _count(connection)):
        # Records differ in size, so this is an estimate that the loop corrects.
        _delete_oldest(connection, math.ceil(rows * (1 - _KEEP * max_bytes / now)))
        connection.commit()
        _shrink(connection)


def _count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(table)).scalar_one()


def _delete_oldest(connection: Connection, number: int) -> int:
    if number <= 0:
        return 0
    oldest = select(table.c.id).order_by(table.c.id).limit(number).scalar_subquery()
    return connection.execute(delete(table).where(table.c.id.in_(oldest))).rowcount


def _shrink(connection: Connection) -> None:
    driver = connection.connection.driver_connection
    if not isinstance(driver, sqlite3.Connection):
        raise TypeError("an evidence log is a SQLite file")
    # A script, because it runs each statement to its end: an ordinary execution frees a single page.
    # The passive checkpoint waits for no reader; what it cannot do, a later one does.
    driver.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(PASSIVE);")


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
