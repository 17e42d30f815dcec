"""Ports and Unix sockets at which a sidecar listens."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import grpc

from guard.errors import UsageError
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.transport.tls import Certificates

_CONNECT_SECONDS = 1.0


def open_port(
    server: grpc.aio.Server, address: str, certificates: Certificates | None, *, socket_mode: str, shared: bool = False
) -> str:
    """Make a gRPC server listen at an address.

    Args:
        server: A server that is not started yet.
        address: HOST:PORT, where port 0 lets the system choose, or unix:PATH.
        certificates: The certificates for TLS; None for a port without TLS.
        socket_mode: File mode of a Unix socket, in octal.
        shared: Whether other processes of the same sidecar listen at the same port.

    Returns:
        The address with the actual port.

    Raises:
        UsageError: The address is taken, not of this machine, or cannot be opened.
    """
    path = socket_path(address)
    if not shared:
        check_free(address)
    if path is not None:
        remove_stale(path)
    # From its first moment, nobody else can connect to the socket.
    before = os.umask(0o177) if path is not None else None
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificates.credentials())
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {address}: gRPC cannot open it") from error
    finally:
        if before is not None:
            os.umask(before)
    if path is None:
        return f"{address.rpartition(':')[0]}:{port}"
    path.chmod(int(socket_mode, 8))
    return address


def check_free(address: str) -> None:
    """Make sure that a server can listen at an address.

    gRPC does not check this for Unix sockets: it deletes the socket of another server and takes its place.

    Raises:
        UsageError: Another process listens there, the address is not of this machine, or we may not write there.
    """
    path = socket_path(address)
    if path is None:
        if not _can_bind(*split_address(address)):
            raise UsageError(f"cannot listen on {address}: the port is taken or the address is not of this machine")
    elif path.is_socket():
        if _answers(path):
            raise UsageError(f"cannot listen on {address}: another process listens there")
    elif path.exists():
        raise UsageError(f"cannot listen on {address}: the file exists and is not a socket")
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot listen on {address}: the folder does not exist or cannot be written")


def remove_stale(path: Path) -> None:
    """Delete a socket that its server left behind; to be called after `check_free`."""
    if path.is_socket() and not _answers(path):
        path.unlink(missing_ok=True)


def _can_bind(host: str, port: int) -> bool:
    """Whether a TCP port can be bound; asked before gRPC tries, which would write lines to standard error."""
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                return True
    return False


def _answers(path: Path) -> bool:
    """Whether a process listens at a socket; True if that cannot be told."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
