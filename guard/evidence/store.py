"""The database of an evidence log: its schema, and how it is opened, filled and kept within its limits."""

import errno
import fcntl
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import TypeAdapter
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    NullPool,
    Row,
    Select,
    Table,
    Text,
    create_engine,
    delete,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.schema import CreateColumn

from guard._files import move_aside, sync
from guard.errors import DamagedLogError, EvidenceError
from guard.evidence.records import Record, rfc3339

SCHEMA = 3
OLDEST_SCHEMA = 1
"""The oldest schema that is still read: that of release 0.1.0. It lacks the columns in `_ADDED`, that of release 0.2.0
some of them."""
COMPANIONS = ("-wal", "-shm")
"""Suffixes of the files that SQLite keeps beside a database: its write-ahead log and an index of that."""
APPLICATION = int.from_bytes(b"grdE")
"""Marks the file as an evidence log, in the header field that SQLite reserves for this purpose."""
_MAGIC, _HEAD_BYTES = b"SQLite format 3\0", 100
"""The beginning of every SQLite file, and the length of its head, where the schema and the mark above are."""
MIN_BYTES = 2**18
BUSY_SECONDS = 2.0
"""How long a statement waits for another process."""
_MAX_LENGTH = 2**20
"""Largest value that is read, in bytes: a log that was tampered with must not fill the memory."""
_MOST_AGED, _MOST_AGED_SHARE = 256, 0.1
"""The most records that are deleted for their age at a time: this number or this share, whichever is more."""
_KEEP = 0.9
"""Share of the allowed size that remains when the oldest records are deleted for it."""

_NUMBERS = TypeAdapter(dict[str, float | None])
"""Scores and thresholds, which are stored as JSON; a number that is not finite as null."""

FAILURES = (DatabaseError, UnicodeDecodeError)
"""What using a damaged log may raise; the second where a text in it, or SQLite's message about it, is not UTF-8."""

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
    *(Column(name, Text, nullable=False) for name in ("scores", "thresholds")),
    *(Column(name, Text, nullable=False, server_default="") for name in ("decided_by", "reference")),
    *(
        Column(name, Text, nullable=False)
        for name in ("trigger", "target", "second_look", "explanation", "input_digest")
    ),
    Column("text", Text, nullable=False, server_default=""),
    # Last, so that a search reads no pictures.
    Column("thumbnail", LargeBinary),
    # An id is never given twice, also after the newest records were deleted.
    sqlite_autoincrement=True,
)

_ADDED = {"decided_by": 2, "reference": 2, "text": 3}
"""Columns that later schemas added, each with the schema that did."""

Identity = tuple[int, int]
"""Device and inode of a file: it keeps them when it is renamed, and no other file has them."""


def engine(path: Path, mode: Literal["ro", "rw"]) -> Engine:
    """Connections to an existing file, each opened when it is needed and closed after use."""

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
        if mode == "ro" and _lies_still(path):
            # To read a log, SQLite makes files beside it, unless it is told that nobody writes.
            uri += "&immutable=1"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
        # One damaged text must not make all others unreadable.
        connection.text_factory = _text
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


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _lies_still(path: Path) -> bool:
    """Whether nobody can be writing to a log: its folder cannot be written, and no records wait in its write-ahead log.

    So it is with a log on a volume that is mounted for reading, after its sidecar has stopped.
    """
    if os.access(path.parent, os.W_OK):
        return False
    try:
        return path.with_name(path.name + COMPANIONS[0]).stat().st_size == 0
    except OSError:
        return True


def check(engine: Engine, path: Path) -> None:
    """Make sure that a file is an evidence log that this guard can use.

    Raises:
        DamagedLogError: It is not an evidence log, is damaged, or has another schema.
        EvidenceError: It is missing, or cannot be opened.
    """
    if not path.exists():
        raise EvidenceError(f"there is no evidence log {path}")
    if not path.is_file():
        raise DamagedLogError(f"{path} is not an evidence log, because it is not a regular file")
    _check_head(path)
    try:
        with engine.connect() as connection:
            connection.execute(select(*columns(connection).values()).order_by(table.c.id.desc()).limit(1)).all()
    except FAILURES as error:
        raise unusable(path, error) from error


def columns(connection: Connection) -> dict[str, ColumnElement[Any]]:
    """The columns of a log by name; an empty value stands for one that a log of an older guard lacks."""
    schema = _pragma(connection, "user_version")
    return {
        column.name: literal("").label(column.name) if _ADDED.get(column.name, 0) > schema else column
        for column in table.c
    }


def _check_head(path: Path) -> None:
    """Make sure that a file is an evidence log before SQLite looks at it, which changes what lies beside some files."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise EvidenceError(f"cannot read the evidence log {path}: {error.strerror}") from error
    if head[:16] != _MAGIC or int.from_bytes(head[68:72]) != APPLICATION:
        raise DamagedLogError(f"{path} is damaged, or is not an evidence log")
    schema = int.from_bytes(head[60:64])
    if not OLDEST_SCHEMA <= schema <= SCHEMA:
        raise DamagedLogError(
            f"the evidence log {path} has schema {schema}, this guard knows {SCHEMA}; "
            f"read it with {'a newer' if schema > SCHEMA else 'the older'} guard"
        )


def unusable(path: Path, error: DatabaseError | UnicodeDecodeError) -> EvidenceError:
    """The error for a log on which the database failed."""
    if isinstance(error, UnicodeDecodeError):
        return DamagedLogError(f"the evidence log {path} is damaged ({error.reason} in a text)")
    code = error_code(error)
    if code in _DAMAGE:
        return DamagedLogError(f"the evidence log {path} is damaged, or is not an evidence log ({error.orig})")
    if not os.access(path, os.R_OK):
        return EvidenceError(f"cannot read the evidence log {path}: {os.strerror(errno.EACCES)}")
    if code == sqlite3.SQLITE_CANTOPEN and not os.access(path.parent, os.W_OK):
        return EvidenceError(
            f"the evidence log {path} has records in its write-ahead log, which cannot be read in a folder that cannot "
            f"be written; copy it together with {path.name}-wal to another folder, and read it there"
        )
    return EvidenceError(f"the evidence log {path} cannot be opened ({error.orig})")


def error_code(error: DatabaseError) -> int | None:
    """SQLite's primary error code; None if the error is not one of SQLite's."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA}
"""Codes of a file that is not a whole log; SQLITE_ERROR and SQLITE_SCHEMA of one without its table or a column."""


def prepare(path: Path) -> Engine:
    """Open an evidence log for writing, create it if there is none, and bring one of an older guard up to date.

    A new log is created beside its place and then linked into it, so that processes that start together find either no
    log or a complete one. Its mode is 0600.

    Raises:
        EvidenceError: As for `check`, or the log cannot be created.
    """
    check_place(path)
    try:
        if not os.path.lexists(path):
            _create(path)
    except OSError as error:
        raise EvidenceError(f"cannot write the evidence log {path}: {error.strerror}") from error
    except DatabaseError as error:
        raise EvidenceError(f"cannot create the evidence log {path}: {error.orig}") from error
    opened = engine(path, "rw")
    check(opened, path)
    try:
        _update(opened)
    except FAILURES as error:
        raise unusable(path, error) from error
    return opened


def _update(opened: Engine) -> None:
    """Give a log of an older schema the columns that it lacks, all or none; another process may do the same."""
    with opened.connect() as connection:
        if _pragma(connection, "user_version") >= SCHEMA:
            return
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        if (schema := _pragma(connection, "user_version")) < SCHEMA:
            for name in (name for name, since in _ADDED.items() if since > schema):
                kind = CreateColumn(table.c[name]).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {kind}")
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")
        connection.commit()
        # So that the head of the file, which is read before SQLite looks at it, says so too.
        connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")


def renew(path: Path, on_damage: Callable[[Path, EvidenceError], object], spoiled: Identity | None = None) -> Engine:
    """Open an evidence log for writing as `prepare` does, and move what cannot be used out of its way.

    Nothing is deleted: the file goes aside whole, together with its write-ahead log.

    Args:
        path: The file.
        on_damage: Called with the new place of what was moved, and why it was.
        spoiled: The identity of a file that has turned out to be damaged, and is moved if it still lies there.

    Raises:
        EvidenceError: A log can neither be opened nor created.
    """
    with _alone_in(path.parent):
        if spoiled is not None and spoiled == identity(path):
            _set_aside(path, EvidenceError(f"the evidence log {path} is damaged"), on_damage)
        elif any(os.path.lexists(each) and not (path.exists() and each.is_file()) for each in _companions(path)):
            # SQLite cannot use what is not a file, and would take the write-ahead log of one file for that of another.
            _set_aside(path, EvidenceError(f"what lies beside the evidence log {path} is not its own"), on_damage)
        try:
            return prepare(path)
        except EvidenceError as error:
            if not is_damage(path, error):
                raise
            _set_aside(path, error, on_damage)
            return prepare(path)


def identity(path: Path) -> Identity | None:
    """The identity of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_damage(path: Path, error: EvidenceError) -> bool:
    """Whether an error is one of the file, so that another file would help."""
    if isinstance(error, DamagedLogError):
        return True
    if not os.path.lexists(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        return False
    if not os.access(path, os.R_OK | os.W_OK):
        return True
    # Something that is not a file lies in the place of one that SQLite keeps beside it.
    return isinstance(error.__cause__, DatabaseError) and error_code(error.__cause__) == sqlite3.SQLITE_CANTOPEN


def _companions(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in COMPANIONS]


def _set_aside(path: Path, error: EvidenceError, on_damage: Callable[[Path, EvidenceError], object]) -> None:
    try:
        place = move_aside(path, COMPANIONS)
    except OSError as failed:
        raise EvidenceError(f"{error}; it cannot be moved aside: {failed.strerror}") from failed
    on_damage(place, error)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time look at a log and move it, so that none moves the new one of another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # `prepare` says what is wrong
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
        new.touch()
        new.chmod(0o600)  # whatever the umask is; what SQLite makes beside it has the same mode
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
        sync(new)
        with suppress(FileExistsError):  # another process created the same file first
            path.hardlink_to(new)
    sync(path.parent)


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
        image = int(values["image"])
        if values["id"] < 1 or not 0 <= image < 2**32:
            raise ValueError(image)  # noqa: TRY301 - it is told as other damage
        return Record(**{**values, "image": image})
    except (AttributeError, TypeError, ValueError) as error:
        raise EvidenceError(f"record {values['id']} of the evidence log is damaged") from error


def size(connection: Connection) -> int:
    """Size of the database in bytes, with free pages, but without the write-ahead log."""
    return _pragma(connection, "page_count") * _pragma(connection, "page_size")


def newest(connection: Connection, before: datetime) -> datetime | None:
    """The time of the newest record that is older than a given time; None if there is none."""
    query = select(table.c.time).where(table.c.time < rfc3339(before)).order_by(table.c.id.desc()).limit(1)
    found = connection.execute(query).scalar()
    try:
        return None if found is None else datetime.fromisoformat(str(found)).astimezone(UTC)
    except (ValueError, OverflowError):  # nobody but a damaged or foreign hand wrote that
        return datetime.min.replace(tzinfo=UTC)


def prune(connection: Connection, *, max_rows: int, max_bytes: int, max_age_days: float | None) -> None:
    """Delete the oldest records beyond the limits, and give their space back to the file system.

    Args:
        connection: A connection for writing.
        max_rows: Largest number of records that are kept.
        max_bytes: Largest size of the file.
        max_age_days: Longest time that a record is kept; None to delete nothing for its age, because it is not known.
            Only a share of the records is deleted for that at a time, so that a wrong clock can be noticed before all
            are gone.
    """
    rows = _count(connection)
    deleted = 0
    if max_age_days is not None:
        oldest = rfc3339(datetime.now(UTC) - timedelta(days=max_age_days))
        aged = select(table.c.id).where(table.c.time < oldest).order_by(table.c.id)
        most = max(_MOST_AGED, math.ceil(rows * _MOST_AGED_SHARE))
        deleted = _delete(connection, aged.limit(most))
    deleted += _delete_oldest(connection, rows - deleted - max_rows)
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
    return _delete(connection, select(table.c.id).order_by(table.c.id).limit(number)) if number > 0 else 0


def _delete(connection: Connection, identities: Select[tuple[int]]) -> int:
    return connection.execute(delete(table).where(table.c.id.in_(identities.scalar_subquery()))).rowcount


def _shrink(connection: Connection) -> None:
    driver = connection.connection.driver_connection
    if not isinstance(driver, sqlite3.Connection):
        raise TypeError("an evidence log is a SQLite file")
    # A script, because it runs each statement to its end: an ordinary execution frees a single page.
    # The passive checkpoint waits for no reader; what it cannot do, a later one does.
    driver.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(PASSIVE);")


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
