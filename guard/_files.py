"""Files and directories that are written whole or not at all, and stamps that show whether a file has changed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
        if target.exists():
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.old.", dir=target.parent) as old:
                target.rename(Path(old) / target.name)
                temporary.rename(target)
        else:
            temporary.rename(target)
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
        Path(name).chmod(mode)
        Path(name).replace(target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def replace_file(target: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: The file cannot be written.
    """
    with replacing(target) as file:
        file.write(data)


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """A value that changes when a file is written or replaced, or when a link leads to another; None without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
