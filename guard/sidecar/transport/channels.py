"""gRPC channels to an inference server: the one place that knows how such a connection is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

Options = Sequence[tuple[str, int | str]]


@dataclass(frozen=True)
class Endpoint:
    """An inference server, as its clients connect to it.

    Attributes:
        address: HOST:PORT or unix:PATH.
        credentials: Credentials for TLS; None for a connection without TLS.
        server_name: The name that the server's certificate must carry; None for the host of the address.
    """

    address: str
    credentials: grpc.ChannelCredentials | None = None
    server_name: str | None = None


def open_channel(endpoint: Endpoint, options: Options = ()) -> grpc.Channel:
    """A channel for synchronous calls.

    Args:
        endpoint: The server.
        options: gRPC channel options.
    """
    if endpoint.credentials is None:
        return grpc.insecure_channel(endpoint.address, _options(endpoint, options))
    return grpc.secure_channel(endpoint.address, endpoint.credentials, _options(endpoint, options))


def open_async_channel(endpoint: Endpoint, options: Options = ()) -> grpc.aio.Channel:
    """A channel for calls on an event loop.

    Args:
        endpoint: The server.
        options: gRPC channel options.
    """
    if endpoint.credentials is None:
        return grpc.aio.insecure_channel(endpoint.address, _options(endpoint, options))
    return grpc.aio.secure_channel(endpoint.address, endpoint.credentials, _options(endpoint, options))


def _options(endpoint: Endpoint, options: Options) -> list[tuple[str, int | str]]:
    """The options of every channel, whichever kind it is."""
    name = endpoint.server_name if endpoint.credentials is not None else None
    return [*options, *([] if name is None else [("grpc.ssl_target_name_override", name)])]
