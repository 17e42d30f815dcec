"""Open a port, or a Unix socket, for a gRPC server."""

import os

import grpc

from guard.errors import UsageError
from guard.sidecar.transport.addresses import check_free, remove_stale, socket_path
from guard.sidecar.transport.tls import Certificates


def open_port(
    server: grpc.aio.Server, address: str, certificates: Certificates | None, *, socket_mode: str, shared: bool = False
) -> str:
    """Have a server listen.

    Args:
        server: That is not started yet.
        address: HOST:PORT, where port 0 lets the system choose, or unix:PATH.
        certificates: For TLS; None for none.
        socket_mode: Of a Unix socket, in octal.
        shared: Whether other processes have the port as well.

    Returns:
        The address, with the port that it has.

    Raises:
        UsageError: It is taken, not of this machine, or cannot be opened.
    """
    path = socket_path(address)
    if not shared:
        check_free(address)
    if path is not None:
        remove_stale(path)
    # A socket is nobody else's from its first moment.
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
