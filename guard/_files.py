"""Files and directories that are written whole or not at all, and stamps that show whether a file has changed.

What is written lies on the disk, not only in a cache, before it takes its place: a power loss leaves the old version
or the new one.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import IO

from guard.errors import UsageError


def check_replaceable(target: Path, *, marker: str) -> None:
    """Make sure that `replace_directory` may write to `target`, for a check before long work.

    Raises:
        UsageError: `target` is a file, or a directory of another kind.
    """
    if target.exists() and not (target / marker).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} exists and has no {marker}; it is not replaced, choose another place")


@contextmanager
def replace_directory(target: Path, *, marker: str) -> Iterator[Path]:
    """Fill a temporary directory that takes the place of `target` when the block ends without an error.

    An older `target` is moved aside first and deleted last, so that at every moment one whole version lies on disk.

    Args:
        target: The directory to write; its parents are created.
        marker: A file that every directory of this kind has. A `target` without it belongs to somebody
            else, and is not replaced.

    Raises:
        UsageError: `target` is a file, or a directory of another kind, or cannot be written.
    """
    check_replaceable(target, marker=marker)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if target.exists():
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.old.", dir=target.parent) as old:
                target.rename(Path(old) / target.name)
                temporary.rename(target)
        else:
            temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing(target: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Fill a temporary file that takes the place of `target` when the block ends without an error.

    Args:
        target: The file to write; its parents are created.
        mode: Permissions of the new file.

    Raises:
        UsageError: The file cannot be written.
    """
    name = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            # By the descriptor, since a name could be changed by others; whatever the umask is.
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        Path(name).replace(target)
        sync(target.parent)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def replace_file(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file whole or not at all.

    Args:
        target: The file to write; its parents are created.
        data: What it will contain.
        mode: Permissions of the new file.

    Raises:
        UsageError: The file cannot be written.
    """
    with replacing(target, mode=mode) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, lie on the disk.

    Where that cannot be done, as in the folders of some network file systems, nobody can be asked for more.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_private_folder(folder: Path) -> None:
    """Make a folder, unless it exists, that only this user can enter, whatever the umask is.

    Raises:
        OSError: It cannot be made, or something else has its name.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(0o700)
    except FileExistsError:  # another process was quicker, or it is no folder
        if not folder.is_dir():
            raise
    else:
        folder.chmod(0o700)
        sync(folder.parent)


def move_aside(path: Path, companions: Sequence[str] = ()) -> Path:
    """Rename what cannot be used to `NAME.damaged-TIME`, in the same folder; nothing is ever overwritten.

    Args:
        path: A file, or whatever else has its name.
        companions: Suffixes of files that belong to it, which are moved first and stay together with it.

    Returns:
        The new place.

    Raises:
        OSError: It cannot be renamed.
    """
    stem = f"{path.name[:160]}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (stem if number == 0 else f"{stem}-{number}" for number in count())
    place = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    for suffix in (*companions, ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(place.with_name(place.name + suffix))
    sync(path.parent)
    return place


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """A value that changes when a file is written or replaced, or when a link leads to another; None without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
