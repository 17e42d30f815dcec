"""The folder of a sidecar's state: who may use it, and what happens to files in it that cannot be used.

Damaged state never keeps a sidecar from starting: it is moved aside, counted and told, and begun anew.
"""

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from guard._files import make_private_folder, move_aside
from guard.errors import GuardError, UsageError

log = logging.getLogger(__name__)

LOCK_FILE = "lock"
Kind = Literal["monitor", "sample", "evidence", "lock"]
"""What a damaged file was, as `guard_state_damaged_total` counts them."""
Role = Literal["alone", "parent", "worker"]
"""What a process is to its sidecar."""
_UNUSABLE = {errno.EISDIR, errno.ELOOP, errno.ENXIO}
"""Errors of opening something that is not a file."""
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def open_folder(folder: Path) -> None:
    """Make the folder, unless it is there.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        make_private_folder(folder)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


@contextmanager
def hold(folder: Path | None, role: Role, on_damage: Callable[[Kind], object] = lambda _: None) -> Iterator[None]:
    """Keep other sidecars away from a folder while the context is open.

    The workers of one sidecar share it. The last of them keeps others away even where the parent was killed.

    Args:
        folder: The folder, which is made if it is missing; None for no state, so that nothing is held.
        role: What this process is to its sidecar; workers are started by a parent that holds the folder.
        on_damage: Called when something else was in the place of the lock.

    Raises:
        UsageError: Another sidecar uses the folder, or it cannot be written.
    """
    if folder is None:
        yield
        return
    open_folder(folder)
    descriptor = _open_lock(folder, on_damage)
    try:
        # The parent makes sure that nobody is there, and then lets its workers in.
        steps = {"alone": (fcntl.LOCK_EX,), "parent": (fcntl.LOCK_EX, fcntl.LOCK_SH), "worker": (fcntl.LOCK_SH,)}
        for kind in steps[role]:
            _take(descriptor, kind, folder)
        if role != "worker":
            _sweep(folder)
        yield
    finally:
        os.close(descriptor)


def check_unused(folder: Path) -> None:
    """Make sure that no sidecar uses a folder now; nothing is written.

    Raises:
        UsageError: A sidecar uses it.
    """
    with suppress(OSError):
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # Shared, so that it keeps a sidecar that starts at this moment away for as short as can be.
            _take(descriptor, fcntl.LOCK_SH, folder)
        finally:
            os.close(descriptor)


def set_aside(
    path: Path, kind: Kind, error: GuardError, on_damage: Callable[[Kind], object], companions: tuple[str, ...] = ()
) -> None:
    """Move a file that cannot be used out of the way, so that a new one can be begun.

    Args:
        path: The file, or what has its name.
        kind: What it was.
        error: Why it cannot be used.
        on_damage: Called with the kind.
        companions: Suffixes of files that belong to it.
    """
    on_damage(kind)
    try:
        place = move_aside(path, companions)
    except OSError as failed:
        log.warning("%s; it stays where it is, since it cannot be moved: %s", error, failed.strerror)
    else:
        log.warning("%s; it was moved to %s, and a new one is begun", error, place.name)


def _open_lock(folder: Path, on_damage: Callable[[Kind], object]) -> int:
    path = folder / LOCK_FILE
    try:
        try:
            return _opened(path)
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            set_aside(path, "lock", GuardError(f"{path} is not a regular file"), on_damage)
            return _opened(path)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {path.name}: {error.strerror}") from error


def _opened(path: Path) -> int:
    """Open or make the file.

    Raises:
        OSError: It cannot be opened, or is not a regular file (EISDIR).
    """
    with suppress(OSError):
        # A file of our own without permissions can be opened again; one of another user must not be taken from it.
        if stat.S_ISREG(path.lstat().st_mode):
            path.chmod(0o600)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    with suppress(OSError):  # the lock of another user
        os.fchmod(descriptor, 0o600)
    return descriptor


def _sweep(folder: Path) -> None:
    """Delete what a sidecar that was killed while it saved has left: files that never took their place."""
    for pattern in (".monitor-*", ".axis-*", ".traffic-*"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                path.unlink()


def _take(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another sidecar uses the folder {folder}; give each its own --state-dir") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UsageError(f"cannot lock the folder {folder}: {error.strerror}") from error
        log.warning("the file system of %s has no locks; make sure that no other sidecar uses it", folder)
