"""gRPC channels to an inference server: the one place that knows how such a connection is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from guard.sidecar.addresses import socket_path

Options = Sequence[tuple[str, int | str]]

DIRECT: Options = (
    # What is called is the server that the operator named, whatever the environment says to other programs: neither a
    # proxy (`http_proxy`, `https_proxy`, `grpc_proxy`), …
    ("grpc.enable_http_proxy", 0),
    # … nor one for ranges of addresses (GRPC_ADDRESS_HTTP_PROXY), of which the option above knows nothing, …
    ("grpc.address_http_proxy_enabled_addresses", ""),
    # … nor a configuration that a DNS server hands out.
    ("grpc.service_config_disable_resolution", 1),
)
"""Options of every channel that guard opens."""


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
    """A channel for synchronous calls; it leads to the endpoint itself, never through a proxy.

    Args:
        endpoint: The server.
        options: gRPC channel options.
    """
    target, all_options = _target(endpoint.address), _options(endpoint, options)
    if endpoint.credentials is None:
        return grpc.insecure_channel(target, all_options)
    return grpc.secure_channel(target, endpoint.credentials, all_options)


def open_async_channel(endpoint: Endpoint, options: Options = ()) -> grpc.aio.Channel:
    """A channel for calls on an event loop; it leads to the endpoint itself, never through a proxy.

    Args:
        endpoint: The server.
        options: gRPC channel options.
    """
    target, all_options = _target(endpoint.address), _options(endpoint, options)
    if endpoint.credentials is None:
        return grpc.aio.insecure_channel(target, all_options)
    return grpc.aio.secure_channel(target, endpoint.credentials, all_options)


def _target(address: str) -> str:
    """The address as a URI: gRPC alone would take a host that is called `xds` or `unix` for a scheme."""
    return address if socket_path(address) is not None else f"dns:///{address}"


def _options(endpoint: Endpoint, options: Options) -> list[tuple[str, int | str]]:
    """The options of every channel, whichever kind it is."""
    name = endpoint.server_name if endpoint.credentials is not None else None
    return [*options, *DIRECT, *([] if name is None else [("grpc.ssl_target_name_override", name)])]
