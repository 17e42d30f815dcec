"""Addresses in the settings of a sidecar: HOST:PORT, or a Unix socket as `unix:PATH`."""

import ipaddress
from pathlib import Path

_UNIX = "unix:"
_LONGEST_PATH = 107
"""The most bytes that the kernel allows for the path of a Unix socket."""


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT into host and port; an IPv6 host is given in brackets, as in `[::1]:80`.

    Raises:
        ValueError: The address does not have that form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether the host of HOST:PORT is of the loopback interface; no name but `localhost` is taken to be.

    Raises:
        ValueError: The address does not have that form.
    """
    host, _ = split_address(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def socket_path(address: str) -> Path | None:
    """The path in `unix:PATH`; None if the address does not begin with `unix:`.

    Raises:
        ValueError: The path is empty or longer than the kernel allows for a socket.
    """
    if not address.startswith(_UNIX):
        return None
    path = address.removeprefix(_UNIX)
    if not path or len(path.encode()) > _LONGEST_PATH:
        raise ValueError(f"{address!r} has no path, or one of more than {_LONGEST_PATH} bytes")
    return Path(path)
