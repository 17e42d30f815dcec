"""Bounded reading of documents that may be anybody's, into the types that describe them.

Every error names the file, says in one sentence what is wrong, and is of the class that the caller asks for.
"""

import hashlib
import json
import math
import os
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from guard.errors import GuardError

T = TypeVar("T")
_LONGEST = 80
"""Characters of a name or a value that a message quotes."""
_PLAIN = {
    "dataclass_type": "it must be an object with names and values",
    "extra_forbidden": "there is no such name",
    "missing": "it is missing",
    "unexpected_keyword_argument": "there is no such name",
}
"""What pydantic says in words of its own, by the type of its error."""
_WITHOUT_VALUE = {"missing", "extra_forbidden", "unexpected_keyword_argument", "value_error"}
"""Kinds of errors whose message does not become clearer by the value that was given."""


_opened: ContextVar[dict[Path, str] | None] = ContextVar("_opened", default=None)
"""What `recording` fills, while it records."""


@contextmanager
def recording() -> Iterator[dict[Path, str]]:
    """Record the SHA-256 of every regular file that is opened while the block runs, by its path.

    Each file is hashed by the descriptor that it is then read from, and must not have changed when it is closed: what
    is recorded is what was used, whatever the name leads to later. A file that is opened twice must be the same twice.
    """
    found: dict[Path, str] = {}
    token = _opened.set(found)
    try:
        yield found
    finally:
        _opened.reset(token)


@contextmanager
def open_regular(
    path: Path, limit: int, error: type[GuardError], *, missing: str | None = None
) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file that is open for reading, and its size in bytes.

    Args:
        path: The file, or a link to it.
        limit: Largest size that is accepted, in bytes. Nothing of a larger file is read, however little it occupies.
        error: Class of the errors.
        missing: Message for a file that does not exist.

    Raises:
        GuardError: The file is missing, not a regular file (a pipe could wait for ever), larger, or not readable; or
            reading it failed while it was open.
    """
    try:
        opened = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - closed below, errors of others aside
    except FileNotFoundError as cause:
        raise error(missing or f"there is no file {path}") from cause
    except ValueError as cause:  # no file can have this name
        raise error(f"cannot read {str(path)[:_LONGEST]!r}: {cause}") from cause
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from cause
    try:
        with opened as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"cannot read {path}: it is not a regular file")
            if status.st_size > limit:
                raise error(f"{path} is larger than {limit} bytes")
            _record(path, file, error)
            yield file, status.st_size
            if _opened.get() is not None and _state(os.fstat(file.fileno())) != _state(status):
                raise error(f"cannot read {path}: it changed while it was read")
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror or cause}") from cause


def _record(path: Path, file: BufferedReader, error: type[GuardError]) -> None:
    found = _opened.get()
    if found is not None:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        if found.setdefault(path, digest) != digest:
            raise error(f"{path} changed between two reads")


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_bytes(path: Path, limit: int, error: type[GuardError], *, missing: str | None = None) -> bytes:
    """The contents of a regular file.

    Args:
        path: The file, or a link to it.
        limit: Largest size that is read, in bytes.
        error: Class of the errors.
        missing: Message for a file that does not exist.

    Raises:
        GuardError: As for `open_regular`, or the file grew or shrank while it was read.
    """
    with open_regular(path, limit, error, missing=missing) as (file, size):
        data = file.read(size + 1)
    if len(data) != size:
        raise error(f"cannot read {path}: it changed while it was read")
    return data


def read_text(path: Path, limit: int, error: type[GuardError], *, missing: str | None = None) -> str:
    """The contents of a UTF-8 file.

    Raises:
        GuardError: As for `read_bytes`, or the file is not UTF-8.
    """
    data = read_bytes(path, limit, error, missing=missing)
    try:
        return data.decode()
    except UnicodeDecodeError as cause:
        raise error(f"{path} is damaged: it is not valid UTF-8 (byte {cause.start + 1})") from cause


def read_json(path: Path, limit: int, error: type[GuardError], *, missing: str | None = None) -> Any:  # noqa: ANN401
    """The value that a JSON file holds.

    JSON is taken by the letter of RFC 8259: NaN, Infinity and numbers as large are refused, and so is what readers
    understand differently, a name that occurs twice in one object and half of a surrogate pair.

    Raises:
        GuardError: As for `read_text`, or the file is not JSON of this kind.
    """
    text = read_text(path, limit, error, missing=missing)
    try:
        return parse_json(text)
    except ValueError as cause:
        raise error(f"{path} is damaged: {cause}") from cause


def parse_json(text: str) -> Any:  # noqa: ANN401
    """The value of a JSON text; what is taken for JSON, `read_json` says.

    Raises:
        ValueError: The text is not JSON of this kind; the message says why.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
        if "\\u" in text:  # an escape such as \ud800 alone is no character, and cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        raise ValueError("it holds half of a surrogate pair") from cause
    except RecursionError as cause:
        raise ValueError("it is nested too deeply") from cause
    except json.JSONDecodeError as cause:
        raise ValueError(f"it is not valid JSON: {cause}") from cause
    return value


def read_object(path: Path, limit: int, error: type[GuardError], *, missing: str | None = None) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        GuardError: As for `read_json`, or the file holds another value.
    """
    value = read_json(path, limit, error, missing=missing)
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it does not hold a JSON object")
    return value


def read_toml(path: Path, limit: int, error: type[GuardError], *, missing: str | None = None) -> dict[str, Any]:
    """The table that a TOML file holds.

    Raises:
        GuardError: As for `read_bytes`, or the file is not TOML.
    """
    data = read_bytes(path, limit, error, missing=missing)
    try:
        return tomllib.loads(data.decode())
    except RecursionError as cause:
        raise error(f"{path} is not valid TOML: it is nested too deeply") from cause
    except ValueError as cause:
        raise error(f"{path} is not valid TOML: {cause}") from cause


def read_document(
    path: Path, form: type[T], limit: int, error: type[GuardError], *, missing: str | None = None, strict: bool = False
) -> T:
    """What a JSON file holds, as a value of the type that describes it.

    Args:
        path: The file.
        form: A dataclass or another type that pydantic can validate.
        limit: Largest size that is read, in bytes.
        error: Class of the errors.
        missing: Message for a file that does not exist.
        strict: Whether to refuse values that would have to be converted, such as a text for a number.

    Raises:
        GuardError: As for `read_json`, or the value does not have this form.
    """
    return validated(path, form, read_json(path, limit, error, missing=missing), error, strict=strict)


def validated(path: Path, form: type[T], value: object, error: type[GuardError], *, strict: bool = False) -> T:
    """A JSON value that was read from `path`, as a value of the type that describes it.

    Raises:
        GuardError: The value does not have this form; the message says where.
    """
    adapter: TypeAdapter[T] = _adapter(form)  # type: ignore[arg-type] # every type can be hashed
    try:
        # Strictly, Python's lists are no tuples; JSON's are.
        return adapter.validate_json(json.dumps(value), strict=True) if strict else adapter.validate_python(value)
    except ValidationError as cause:
        raise error(f"{path} is damaged: {first_error(cause)}") from cause
    except GuardError as cause:  # a dataclass refused its values
        raise error(f"{path} is damaged: {cause}") from cause
    except RecursionError as cause:
        raise error(f"{path} is damaged: it is nested too deeply") from cause


@cache
def _adapter(form: type[T]) -> TypeAdapter[T]:
    # Building one takes about 0.1 s for a profile.
    return TypeAdapter(form)


def first_error(error: ValidationError) -> str:
    """The first of pydantic's errors as `where.exactly: what`; entries of a list are counted from 1."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part + 1) if isinstance(part, int) else _quotable(part) for part in first["loc"])
    what = _PLAIN.get(first["type"], first["msg"].removeprefix("Value error, "))
    given = first["input"]
    if first["type"] not in _WITHOUT_VALUE and (given is None or isinstance(given, str | int | float)):
        what += f", not {_short(given)!r}" if isinstance(given, str) else f", not {_short(str(given))}"
    return f"{where}: {what}" if where else what


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe that nobody writes to without waiting for it, so that it can be refused."""
    return os.open(path, flags | os.O_NONBLOCK)


def _quotable(name: str) -> str:
    return _short(name) if name.isprintable() else repr(_short(name))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _refuse(number: str) -> float:
    raise ValueError(f"it holds the number {number[:32]}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {_quotable(twice)} occurs twice in one object")
    return found
