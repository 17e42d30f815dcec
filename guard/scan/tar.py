"""Members of a tar file that may be anybody's, read one after the other, in bounded memory.

Python's `tarfile` ends in silence at a damaged header in the middle of a file, and reads extended headers of any size.
Here nothing is ever extracted: a member is a name and some bytes. Read are the forms that WebDataset and its like
write: ustar, GNU (long names) and pax (paths and sizes).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

_BLOCK = 512
_MAX_EXTENSION = 2**20
"""Largest extended header, in bytes."""
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"


class TarError(ValueError):
    """The file is damaged from here on."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar file.

    Attributes:
        name: Its name; it may be anything, and is never used as a path.
        size: Its length in bytes.
        data: Its contents; None if it is longer than the reader was willing to read.
    """

    name: str
    size: int
    data: bytes | None


def members(file: BufferedReader, size: int, limit: int) -> Iterator[Member]:
    """The regular files in an uncompressed tar file; links, devices and folders are passed over.

    Args:
        file: The open file, at its start.
        size: Its length in bytes.
        limit: Largest member whose contents are read, in bytes.

    Raises:
        TarError: A header is damaged, or the file ends within a member. What came before was good.
    """
    name, length = "", -1  # of an extended header, for the member that follows
    while True:
        header = file.read(_BLOCK)
        if not header.strip(b"\0"):  # the end, as it should be, or as careless writers leave it
            return
        _check(header)
        claimed = _number(header[124:136])
        kind = header[156:157]
        extended = kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL)
        count = claimed if extended or length < 0 else length
        if file.tell() + count > size:
            raise TarError(f"it ends within a member of {count} bytes")
        if extended:
            if count > _MAX_EXTENSION:
                raise TarError(f"an extended header has {count} bytes")
            content = _contents(file, count)
            if kind == _LONG_NAME:
                name = _text(content)
            elif kind == _PAX:
                name, length = _extended(content, name)
            continue
        own = name or _name(header)
        name, length = "", -1
        if kind in _REGULAR:
            data = _contents(file, count) if count <= limit else None
            if data is None:
                file.seek(_padded(count), 1)
            yield Member(own, count, data)
        else:
            file.seek(_padded(count), 1)


def _check(header: bytes) -> None:
    if len(header) < _BLOCK:
        raise TarError("it ends within a header")
    # Some writers sum signed bytes.
    body = header[:148] + b" " * 8 + header[156:]
    if _number(header[148:156]) not in (sum(body), sum(byte - 256 * (byte > 127) for byte in body)):
        raise TarError("a header has a wrong checksum")


def _number(field: bytes) -> int:
    """A number in octal digits, or, if its first bit is set, in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarError("a header holds no number where there must be one")
    return int(digits or b"0", 8)


def _contents(file: BufferedReader, count: int) -> bytes:
    data = file.read(count)
    file.seek(_padded(count) - count, 1)
    if len(data) < count:
        raise TarError("it ends within a member")
    return data


def _padded(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _extended(content: bytes, name: str) -> tuple[str, int]:
    """The path and the size that a pax header gives to the next member; −1 for no size."""
    size, rest = -1, content
    while rest.strip(b"\0"):
        length, space, _ = rest.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length[:9]) <= len(rest):
            raise TarError("an extended header is damaged")
        key, _, value = rest[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 15:
                raise TarError("an extended header holds a size that is none")
            size = int(value)
        rest = rest[int(length) :]
    return name, size
