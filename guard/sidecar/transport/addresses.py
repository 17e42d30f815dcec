"""Where a sidecar listens and what it calls: HOST:PORT, or a Unix socket as `unix:PATH`."""

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path

from guard.errors import UsageError

_UNIX = "unix:"
_LONGEST_PATH = 107
"""Bytes of a Unix socket's path, by the kernel's limit."""
_CONNECT_SECONDS = 1.0


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT as a pair; `[::1]:80` for IPv6.

    Raises:
        ValueError: It is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether a HOST:PORT is of the loopback interface; a name other than `localhost` is taken not to be.

    Raises:
        ValueError: It is not of that form.
    """
    host, _ = split_address(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def socket_path(address: str) -> Path | None:
    """The path of `unix:PATH`; None for HOST:PORT.

    Raises:
        ValueError: The path is empty or longer than a socket's may be.
    """
    if not address.startswith(_UNIX):
        return None
    path = address.removeprefix(_UNIX)
    if not path or len(path.encode()) > _LONGEST_PATH:
        raise ValueError(f"{address!r} has no path, or one of more than {_LONGEST_PATH} bytes")
    return Path(path)


def check_free(address: str) -> None:
    """Make sure that a server can listen there. gRPC would not: it deletes another server's socket and takes its place.

    Raises:
        UsageError: Somebody listens there, or the place is not of this machine or not ours to write.
    """
    path = socket_path(address)
    if path is None:
        if not _can_bind(*split_address(address)):
            raise UsageError(f"cannot listen on {address}: the port is taken or the address is not of this machine")
    elif path.is_socket():
        if _answers(path):
            raise UsageError(f"cannot listen on {address}: another process listens there")
    elif path.exists():
        raise UsageError(f"cannot listen on {address}: the file exists and is no socket")
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot listen on {address}: the folder does not exist or cannot be written")


def remove_stale(path: Path) -> None:
    """Delete a socket that its server left behind; after `check_free`."""
    if path.is_socket() and not _answers(path):
        path.unlink(missing_ok=True)


def _can_bind(host: str, port: int) -> bool:
    """Tried before gRPC does, which would write lines of its own to standard error."""
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                return True
    return False


def _answers(path: Path) -> bool:
    """Whether anybody listens at a socket; where that cannot be told, somebody does."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
