"""The page of a sidecar: heads that programs read differently, handshakes that never end, and half a certificate."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shutil import copyfile

import pytest

from guard.sidecar.host.dashboard import Access, serve_dashboard
from guard.sidecar.host.dashboard.access import tls_context
from guard.sidecar.transport import http_server
from tests.fake_sidecar import FakeSidecar
from tests.integration.sidecar.test_tls import Authority, Pair

SECONDS = 30


@contextmanager
def page(access: Access | None = None) -> Iterator[tuple[str, int]]:
    with serve_dashboard("127.0.0.1:0", [FakeSidecar()], access or Access()) as address:
        host, _, port = address.rpartition(":")
        yield host, int(port)


def asked(place: tuple[str, int], head: bytes) -> bytes:
    """The first line of the answer."""
    with socket.create_connection(place, SECONDS) as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").readline()


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: y\r\n Host: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHOST: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Site: none\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: x\r\nAuthorization: y\r\n\r\n",
        b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_a_head_that_is_cut_off_or_has_two_readings_is_refused(head: bytes) -> None:
    with page() as place:
        assert asked(place, head).startswith(b"HTTP/1.0 400 ")


@pytest.mark.parametrize(
    "host", ["localhost@evil", "evil@localhost", "localhost:80:80", "[::1", "::1]", "[]", "127.1", "0x7f.0.0.1"]
)
def test_a_host_that_only_resembles_this_machine_is_not_this_machine(host: str) -> None:
    with page() as place:
        assert asked(place, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).startswith(b"HTTP/1.0 421 ")


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Authority, Pair, Pair]:
    authority = Authority(tmp_path, "ours")
    return authority, authority.issue("old"), authority.issue("new")


def presented(place: tuple[str, int], authority: Authority) -> str:
    """The name in the certificate that the page presents."""
    context = ssl.create_default_context(cafile=authority.certificate)
    with (
        socket.create_connection(place, SECONDS) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        certificate = connection.getpeercert()
        assert certificate is not None
        return str(dict(each[0] for each in certificate["subject"])["commonName"])  # type: ignore[misc] # a union


def test_a_certificate_without_its_key_is_not_used_and_the_pair_is_at_once(
    pairs: tuple[Authority, Pair, Pair], tmp_path: Path
) -> None:
    authority, old, new = pairs
    certificate, key = copyfile(old.certificate, tmp_path / "c"), copyfile(old.key, tmp_path / "k")
    with page(Access(tls=tls_context(certificate, key, None))) as place:
        assert presented(place, authority) == "old"
        copyfile(new.certificate, certificate)
        assert [presented(place, authority) for _ in range(2)] == ["old", "old"]
        copyfile(new.key, key)
        assert presented(place, authority) == "new"


def test_a_renewal_changes_nothing_about_who_is_let_in(pairs: tuple[Authority, Pair, Pair], tmp_path: Path) -> None:
    authority, old, new = pairs
    certificate, key = copyfile(old.certificate, tmp_path / "c"), copyfile(old.key, tmp_path / "k")
    known, unknown = (ssl.create_default_context(cafile=authority.certificate) for _ in range(2))
    known.load_cert_chain(new.certificate, new.key)

    def answered(context: ssl.SSLContext) -> bytes:
        with (
            socket.create_connection(place, SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
            suppress(OSError),
        ):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection.recv(100)
        return b""

    with page(Access(tls=tls_context(certificate, key, authority.certificate))) as place:
        for _ in range(2):
            assert answered(known).startswith(b"HTTP/1.0 200 ")
            assert answered(unknown) == b""
            copyfile(new.certificate, certificate)
            copyfile(new.key, key)


def test_handshakes_that_do_not_go_on_count_among_the_connections(
    pairs: tuple[Authority, Pair, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 10 * SECONDS)
    authority, old, _ = pairs
    with page(Access(tls=tls_context(old.certificate, old.key, None))) as place, ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(place, SECONDS)) for _ in range(8)]
        # The oldest made room, while the newest may still go on.
        for each in silent[:4]:
            with pytest.raises(ConnectionResetError):
                raise ConnectionResetError if not each.recv(1) else AssertionError
        assert presented(place, authority) == "old"
