"""Addresses in the settings of a sidecar: HOST:PORT, or a Unix socket as `unix:PATH`."""

import ipaddress
import re
from pathlib import Path

_UNIX = "unix:"
_PORT = re.compile(r"[0-9]{1,5}")
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]+(\.(?!-)[A-Za-z0-9_-]+)*\.?")
"""A host name: letters, digits, hyphens and, in the names of containers, underscores."""
_LONGEST_PATH = 107
"""The most bytes that the kernel allows for the path of a Unix socket."""


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT into host and port; an IPv6 host is given in brackets, as in `[::1]:80`.

    Only hosts that every program reads as the same host are taken: gRPC reads `::1:9000` as another address, and a
    `*` as none.

    Raises:
        ValueError: The address does not have that form.
    """
    host, colon, port = address.rpartition(":")
    if not host or not colon or not _PORT.fullmatch(port) or int(port) > 65_535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        known = _is_ip(host, ipaddress.IPv6Address)
    elif set(host) <= set("0123456789."):
        known = _is_ip(host, ipaddress.IPv4Address)
    else:
        known = bool(_NAME.fullmatch(host))
    if not known:
        raise ValueError(
            f"{address!r} is not HOST:PORT, where HOST is a name, an IPv4 address, or an IPv6 address in brackets"
        )
    return host, int(port)


def _is_ip(text: str, kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


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
    """The path in `unix:PATH`, or in `unix:///PATH`; None if the address does not begin with `unix:`.

    Raises:
        ValueError: The path is empty, longer than the kernel allows for a socket, or one that gRPC, for which it is
            part of a URI, reads as another.
    """
    if not address.startswith(_UNIX):
        return None
    path = address.removeprefix(_UNIX)
    if path.startswith("//"):
        host, slash, rest = path.removeprefix("//").partition("/")
        if host or not slash or rest.startswith("/"):
            raise ValueError(f"{address!r} names a host and not a socket; write unix:PATH, or three slashes")
        path = f"/{rest}"
    if not path or len(path.encode(errors="replace")) > _LONGEST_PATH:
        raise ValueError(f"{address!r} has no path, or one of more than {_LONGEST_PATH} bytes")
    if not path.isprintable() or set(path) & set("%?#"):
        raise ValueError(
            f"{address!r} has a character in its path that gRPC reads as another (%, ?, # or a control one)"
        )
    return Path(path)
