"""Where guard's own service may be served."""

from pathlib import Path
from typing import Any

import pytest

from guard.errors import UsageError
from guard.sidecar import Settings

TLS = {"tls_certificate": "c", "tls_key": "k"}


def addresses(admin: str | None, **more: Any) -> tuple[str, ...]:
    return Settings.load(None, profile=Path("p"), model=Path("m"), admin=admin, **more).admin_addresses


def test_by_default_it_is_served_nowhere() -> None:
    assert addresses(None) == ()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/run/admin"])
def test_addresses_of_this_machine_alone_need_no_certificates(address: str) -> None:
    assert addresses(address) == (address,)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.168.0.1:1", "example.org:1", "localhost.org:1"])
def test_others_are_for_clients_with_certificates_only(address: str) -> None:
    for without in ({}, TLS):
        with pytest.raises(UsageError, match="--tls-client-ca"):
            addresses(address, **without)
    assert addresses(address, **TLS, tls_client_ca="a") == (address,)


def test_several_processes_have_a_socket_each() -> None:
    assert addresses("unix:/run/admin", processes=3) == tuple(f"unix:/run/admin.{process}" for process in range(3))
    with pytest.raises(UsageError, match="unix:PATH"):
        addresses("127.0.0.1:1", processes=2)
    longest = "unix:" + 105 * "x"
    assert len(addresses(longest, processes=10)) == 10
    with pytest.raises(UsageError, match="107 bytes"):
        addresses(longest, processes=11)


def test_an_address_of_another_form_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^admin: .* is not HOST:PORT"):
        addresses("admin")
