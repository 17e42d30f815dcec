"""TLS on the inference port and towards the upstream server, with certificates made here by the openssl program."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard.errors import UsageError
from guard.sidecar.transport.tls import Certificates, read_authorities, read_pair
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Client,
    Floats,
    Launcher,
    Sidecar,
    Upstream,
    connected,
    eventually,
    infer_request,
    refused_start,
)


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path

    @property
    def as_client(self) -> tuple[bytes, bytes]:
        """In the order of gRPC's arguments."""
        return self.key.read_bytes(), self.certificate.read_bytes()


class Authority:
    """A certificate authority, and what it signs."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder, name
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl(self.certificate, self._key, f"/CN={name}")

    def issue(self, name: str, *, host: str = "localhost") -> Pair:
        pair = Pair(self._folder / f"{self.name}-{name}.pem", self._folder / f"{self.name}-{name}.key")
        signer = ("-CA", self.certificate, "-CAkey", self._key, "-addext", "basicConstraints=critical,CA:FALSE")
        names = ("-addext", f"subjectAltName=DNS:{host}" + (",IP:127.0.0.1" if host == "localhost" else ""))
        self._openssl(pair.certificate, pair.key, f"/CN={name}", *signer, *names)
        return pair

    @staticmethod
    def _openssl(certificate: Path, key: Path, subject: str, *more: str | Path) -> None:
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2")
        command = ["openssl", "req", "-x509", *kind, "-subj", subject, "-keyout", key, "-out", certificate, *more]
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    return Authority(folder, "strange")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("server")


@contextmanager
def secured(address: str, authority: Authority, pair: Pair | None = None) -> Iterator[Client]:
    """A client over TLS, on a connection of its own."""
    with connected(address) as client:
        client.channel.close()
        credentials = grpc.ssl_channel_credentials(
            authority.certificate.read_bytes(), *(pair.as_client if pair else ())
        )
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        client.channel = grpc.secure_channel(address, credentials, options)
        yield client


def is_answered(client: Client) -> bool:
    try:
        client.call("ServerLive")
    except grpc.RpcError as error:
        failed: Any = error
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        return False
    return True


def test_the_port_takes_tls_only(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats, authority: Authority, server: Pair
) -> None:
    tls = ("--tls-certificate", server.certificate, "--tls-key", server.key)
    with launch("--model", exported, "--profile", served_profile, *tls) as sidecar:
        assert sidecar.announced["tls"] == "server"
        with secured(sidecar.address, authority) as client:
            assert client.infer(infer_request(clean[:1])).decision in {"pass", "flag"}
        with connected(sidecar.address) as plain:
            assert not is_answered(plain)


def test_with_client_authorities_a_client_needs_a_certificate_of_theirs(
    launch: Launcher, exported: Path, served_profile: Path, authority: Authority, stranger: Authority, server: Pair
) -> None:
    tls = ("--tls-certificate", server.certificate, "--tls-key", server.key, "--tls-client-ca", authority.certificate)
    with launch("--model", exported, "--profile", served_profile, *tls) as sidecar:
        assert sidecar.announced["tls"] == "mutual"
        for pair, answered in ((None, False), (stranger.issue("client"), False), (authority.issue("client"), True)):
            with secured(sidecar.address, authority, pair) as client:
                assert is_answered(client) is answered
        assert sidecar.metric("guard_ready") == 1  # the HTTP port asks for none


def test_a_renewed_certificate_is_used_and_a_broken_one_is_not(
    launch: Launcher, exported: Path, served_profile: Path, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def put(pair: Pair) -> None:
        certificate.write_bytes(pair.certificate.read_bytes())
        key.write_bytes(pair.key.read_bytes())

    def answers(sidecar: Sidecar, to: Authority) -> bool:
        with secured(sidecar.address, to) as client:
            return is_answered(client)

    put(authority.issue("first"))
    tls = ("--tls-certificate", certificate, "--tls-key", key)
    with launch("--model", exported, "--profile", served_profile, *tls) as sidecar:
        with secured(sidecar.address, authority) as before:
            assert is_answered(before)
            put(stranger.issue("second"))
            eventually(lambda: answers(sidecar, stranger), "the use of the renewed certificate")
            assert not answers(sidecar, authority)
            assert is_answered(before)
        failures = sidecar.metric("guard_tls_reload_failures_total")
        certificate.write_bytes(b"no certificate")
        # Nobody connects, and it is seen all the same.
        eventually(lambda: sidecar.metric("guard_tls_reload_failures_total") > failures, "the count of the failure")
        assert "the changed TLS files are not used, the old ones stay" in sidecar.stderr
        assert answers(sidecar, stranger)
        put(authority.issue("third"))
        eventually(lambda: answers(sidecar, authority), "the use of the mended certificate")


def test_an_unchanged_file_is_not_read_again_and_a_broken_one_is_counted_once(server: Pair, tmp_path: Path) -> None:
    certificate, failures = tmp_path / "tls.crt", []
    certificate.write_bytes(server.certificate.read_bytes())
    certificates = Certificates(certificate, server.key, None, lambda: failures.append(1))
    assert certificates._renewed() is None
    certificate.unlink()
    for _ in range(3):
        assert certificates._renewed() is None
    assert len(failures) == 1
    certificate.write_bytes(server.certificate.read_bytes())
    assert certificates._renewed() is not None
    assert certificates._renewed() is None


def test_certificates_that_make_no_whole_stop_the_start(
    exported: Path, served_profile: Path, server: Pair, authority: Authority
) -> None:
    other = authority.issue("other")
    code, lines = refused_start(
        "--model",
        exported,
        "--profile",
        served_profile,
        "--tls-certificate",
        server.certificate,
        "--tls-key",
        other.key,
    )
    assert (code, len(lines)) == (2, 1)
    assert str(other.key) in lines[0]


def test_what_gprc_could_not_serve_with_is_refused_with_the_reason(server: Pair, tmp_path: Path) -> None:
    edwards = Pair(tmp_path / "edwards.pem", tmp_path / "edwards.key")
    command = ["openssl", "req", "-x509", "-noenc", "-subj", "/CN=e", "-newkey", "ed25519"]
    subprocess.run([*command, "-keyout", edwards.key, "-out", edwards.certificate], check=True, capture_output=True)
    with pytest.raises(UsageError, match="Ed25519"):
        read_pair(edwards.certificate, edwards.key)
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", "-in", str(server.key), "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(UsageError, match="without a password"):
        read_pair(server.certificate, locked)
    with pytest.raises(UsageError, match="cannot read"):
        read_pair(tmp_path / "absent", server.key)
    with pytest.raises(UsageError, match="no PEM certificates"):
        read_authorities(server.key)


def test_authorities_may_have_comments_in_any_language(authority: Authority, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes("# Főtanúsítvány\n".encode() + authority.certificate.read_bytes())
    assert read_authorities(bundle) == read_authorities(authority.certificate)


@contextmanager
def tls_upstream(upstream: Upstream, pair: Pair, clients: Authority) -> Iterator[str]:
    """A server of the same answers that takes mutual TLS only; its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(answer)
        for name, answer in (
            ("ServerReady", lambda data, _: upstream._known("ServerReady", data)),
            ("ModelInfer", lambda data, _: upstream.respond(data)),
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    credentials = grpc.ssl_server_credentials(
        [pair.as_client], clients.certificate.read_bytes(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_the_upstream_server_is_spoken_to_over_mutual_tls(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    upstream: Upstream,
    clean: Floats,
    authority: Authority,
    stranger: Authority,
) -> None:
    mine = authority.issue("sidecar")
    shown = ("--upstream-certificate", mine.certificate, "--upstream-key", mine.key)
    with tls_upstream(upstream, authority.issue("models", host="models.internal"), authority) as address:
        arguments = ("--model", exported, "--profile", served_profile, "--upstream", address, *shown)
        trusted = ("--upstream-tls", authority.certificate, "--upstream-server-name", "models.internal")
        with launch(*arguments, *trusted) as sidecar, connected(sidecar.address) as client:
            assert client.infer(infer_request(clean[:1])).outputs[0] == "logits"
            eventually(lambda: sidecar.metric("guard_ready") == 1, "readiness")
        for wrong in (
            ("--upstream-tls", authority.certificate),  # the name is not that of the address
            ("--upstream-tls", stranger.certificate, "--upstream-server-name", "models.internal"),
            ("--upstream-tls", "system", "--upstream-server-name", "models.internal"),
        ):
            with launch(*arguments, *wrong) as sidecar, connected(sidecar.address) as client:
                error = client.refused(infer_request(clean[:1]), timeout=WAIT_SECONDS)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
