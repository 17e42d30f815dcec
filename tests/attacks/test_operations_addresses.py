"""Addresses that guard, gRPC and the kernel would read differently are refused before anything is called."""

from pathlib import Path

import pytest

from guard.errors import UsageError
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.settings import Settings

BAD_HOSTS = [
    "::1:9000",
    "::1",
    "fe80::1:80",
    "[::1:80",
    "::1]:80",
    "[127.0.0.1]:80",
    "[]:80",
    "[::1]]:80",
    "*:8001",
    "1.2.3:80",
    "127.1:80",
    "1.2.3.256:80",
    "2130706433:80",
    "a b:80",
    "a/b:80",
    "dns:a:80",
    "dns:///a:80",
    "xds:a:80",
    "http://a:80",
    "user@a:80",
    "a,b:80",
    "ä:80",
    "-a:80",
    "a..b:80",
    "a:080000",
    "a:+80",
    "a: 80",
    "a:8_0",
]
GOOD_HOSTS = {
    "127.0.0.1:0": ("127.0.0.1", 0),
    "192.0.2.1:80": ("192.0.2.1", 80),
    "[::1]:80": ("::1", 80),
    "[fe80::1%eth0]:80": ("fe80::1%eth0", 80),
    "localhost:80": ("localhost", 80),
    "my_models-1.svc.cluster.local.:80": ("my_models-1.svc.cluster.local.", 80),
    "xds:9000": ("xds", 9000),
}


@pytest.mark.parametrize("address", BAD_HOSTS)
@pytest.mark.parametrize("name", ["listen", "metrics", "upstream", "admin"])
def test_a_host_that_is_read_differently_is_refused(name: str, address: str) -> None:
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        Settings.load(None, profile="p", model="m", **{name: address})


@pytest.mark.parametrize(("address", "parts"), GOOD_HOSTS.items())
def test_hosts_of_every_form_are_taken(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_an_upstream_server_has_a_port() -> None:
    with pytest.raises(UsageError, match="has port 0, at which no server can be called"):
        Settings.load(None, profile="p", model="m", upstream="127.0.0.1:0")


@pytest.mark.parametrize(
    "address",
    [
        "unix://tmp/x",
        "unix://",
        "unix:////x",
        "unix:",
        "unix:/a%20b",
        "unix:/a?b",
        "unix:/a#b",
        "unix:/a\nb",
        "unix:/\0",
    ],
)
@pytest.mark.parametrize("name", ["listen", "upstream", "admin"])
def test_a_socket_that_is_read_differently_is_refused(name: str, address: str) -> None:
    with pytest.raises(UsageError, match=r"three slashes|has no path|reads as another"):
        Settings.load(None, profile="p", model="m", **{name: address})


@pytest.mark.parametrize(
    ("address", "path"), [("unix:a", "a"), ("unix:/a/b", "/a/b"), ("unix:///a/b", "/a/b"), ("unix:ä", "ä")]
)
def test_sockets_of_every_form_are_taken(address: str, path: str) -> None:
    assert socket_path(address) == Path(path)
