"""TLS files that OpenSSL takes and gRPC does not: refused with the reason, before a start and as a renewal."""

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from guard.errors import UsageError
from guard.sidecar.transport.tls import Certificates, client_credentials, read_authorities, read_pair

KEYS = {
    "RSA": ("RSA", "rsa_keygen_bits:2048"),
    "P-256": ("EC", "ec_paramgen_curve:P-256"),
    "P-384": ("EC", "ec_paramgen_curve:P-384"),
    "P-521": ("EC", "ec_paramgen_curve:P-521"),
    "P-224": ("EC", "ec_paramgen_curve:P-224"),
    "secp256k1": ("EC", "ec_paramgen_curve:secp256k1"),
    "brainpool": ("EC", "ec_paramgen_curve:brainpoolP256r1"),
    "explicit": ("EC", "ec_paramgen_curve:P-256", "ec_param_enc:explicit"),
    "RSA-PSS": ("RSA-PSS", "rsa_keygen_bits:2048"),
    "Ed25519": ("ED25519",),
    "Ed448": ("ED448",),
}
USABLE = {"RSA", "P-256", "P-384"}
AUTHORITIES = USABLE | {"P-521", "P-224", "Ed25519"}


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


class Maker:
    """Makes certificates with the program openssl, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self, kind: str, name: str = "localhost", *, signer: Pair | None = None, more: tuple[str, ...] = ()
    ) -> Pair:
        stem = self._folder / "-".join([kind, name, "self" if signer is None else signer.key.stem, *more]).replace(
            "/", ""
        )
        pair = Pair(stem.with_suffix(".crt"), stem.with_suffix(".key"))
        if pair.certificate.exists():
            return pair
        algorithm, *options = KEYS[kind]
        chosen = [word for option in options for word in ("-pkeyopt", option)]
        self.openssl("genpkey", "-algorithm", algorithm, *chosen, "-out", pair.key)
        by = () if signer is None else ("-CA", signer.certificate, "-CAkey", signer.key)
        about = ("-days", "3", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
        self.openssl("req", "-x509", "-new", "-key", pair.key, "-out", pair.certificate, *about, *by, *more)
        return pair

    @staticmethod
    def openssl(*words: str | Path) -> None:
        subprocess.run(["/usr/bin/env", "openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("certificates"))


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc] # gRPC has no types
    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda data, _: data)


@pytest.fixture
def shake() -> Iterator[Callable[..., bool]]:
    """Whether a client and a server of gRPC shake hands with what guard read."""
    servers = []

    def tried(
        server: tuple[bytes, bytes], trusted: bytes, client_ca: bytes | None = None, own: Pair | None = None
    ) -> bool:
        listening = grpc.server(ThreadPoolExecutor(1))
        servers.append(listening)
        listening.add_generic_rpc_handlers((_Echo(),))
        credentials = grpc.ssl_server_credentials([server[::-1]], client_ca, require_client_auth=client_ca is not None)
        port = listening.add_secure_port("127.0.0.1:0", credentials)
        listening.start()
        mine = (None, None) if own is None else read_pair(own.certificate, own.key)[::-1]
        with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(trusted, *mine)) as channel:
            try:
                return bool(channel.unary_unary("/a/b")(b"x", timeout=5) == b"x")
            except grpc.RpcError:
                return False

    yield tried
    for each in servers:
        each.stop(None)


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_is_taken_exactly_if_grpc_shakes_hands_with_it(
    make: Maker, shake: Callable[..., bool], kind: str
) -> None:
    pair = make(kind)
    if kind not in USABLE:
        with pytest.raises(UsageError, match=r"gRPC cannot use .*; take RSA, or ECDSA"):
            read_pair(pair.certificate, pair.key)
        with pytest.raises(UsageError, match="gRPC cannot use"):
            client_credentials(str(make("RSA").certificate), pair.certificate, pair.key)
        return
    read = read_pair(pair.certificate, pair.key)
    assert shake(read, read_authorities(pair.certificate))
    assert shake(read, read_authorities(pair.certificate), read_authorities(pair.certificate), pair)


@pytest.mark.parametrize("kind", KEYS)
def test_authorities_are_taken_exactly_if_grpc_can_check_their_signatures(
    make: Maker, shake: Callable[..., bool], kind: str
) -> None:
    authority, server = make(kind, "authority"), make("RSA")
    if kind not in AUTHORITIES:
        with pytest.raises(UsageError, match="signatures gRPC cannot check"):
            read_authorities(authority.certificate)
        with pytest.raises(UsageError, match="signatures gRPC cannot check"):
            Certificates(server.certificate, server.key, authority.certificate)
        return
    client = make("P-256", "client", signer=authority)
    trusted = read_authorities(server.certificate)
    assert shake(read_pair(server.certificate, server.key), trusted, read_authorities(authority.certificate), client)


@pytest.mark.parametrize(
    ("more", "good"),
    [
        (("-sha224",), True),
        (("-md5",), False),
        (("-sha3-256",), False),
        (("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"), True),
        (("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:20"), False),
        (("-sha1", "-sigopt", "rsa_padding_mode:pss"), False),
    ],
)  # fmt: skip
def test_a_signature_is_taken_exactly_if_grpc_can_check_it(
    make: Maker, shake: Callable[..., bool], more: tuple[str, ...], *, good: bool
) -> None:
    authority = make("RSA", "authority")
    pair = make("P-256", signer=authority, more=more)
    if good:
        assert shake(read_pair(pair.certificate, pair.key), read_authorities(authority.certificate))
    else:
        with pytest.raises(UsageError, match=r"is signed with|md too weak"):
            read_pair(pair.certificate, pair.key)


def _with_bom(pair: Pair) -> None:
    pair.certificate.write_bytes(b"\xef\xbb\xbf" + pair.certificate.read_bytes())


def _key_with_bom(pair: Pair) -> None:
    pair.key.write_bytes(b"\xef\xbb\xbf" + pair.key.read_bytes())


def _trusted(pair: Pair) -> None:
    Maker.openssl("x509", "-in", pair.certificate, "-trustout", "-out", pair.certificate)


def _parameters_by_value(pair: Pair) -> None:
    Maker.openssl("ec", "-in", pair.key, "-param_enc", "explicit", "-out", pair.key)


def _indented(pair: Pair) -> None:
    pair.certificate.write_text(pair.certificate.read_text() + "\n " + pair.certificate.read_text())


BAD_FORMS = {
    "byte-order mark": _with_bom,
    "byte-order mark before the key": _key_with_bom,
    "TRUSTED CERTIFICATE": _trusted,
    "a second block that is indented": _indented,
}


def _windows(pair: Pair) -> None:
    for file in (pair.certificate, pair.key):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))


def _attributes(pair: Pair) -> None:
    pair.certificate.write_bytes("Bag Attributes\n  friendlyName: Zürich\n".encode() + pair.certificate.read_bytes())


def _together(pair: Pair) -> None:
    pair.certificate.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())


def _traditional(pair: Pair) -> None:
    Maker.openssl("ec", "-in", pair.key, "-out", pair.key)
    pair.key.write_bytes(
        b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" + pair.key.read_bytes()
    )


GOOD_FORMS = {
    "CRLF": _windows,
    "bag attributes": _attributes,
    "key and certificate": _together,
    "SEC 1": _traditional,
    "a key with parameters by value": _parameters_by_value,
}


@pytest.fixture
def own(make: Maker, tmp_path: Path) -> Pair:
    """A pair whose files a test may change."""
    pair, mine = make("P-256"), Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    mine.certificate.write_bytes(pair.certificate.read_bytes())
    mine.key.write_bytes(pair.key.read_bytes())
    return mine


@pytest.mark.parametrize("change", BAD_FORMS.values(), ids=list(BAD_FORMS))
def test_a_form_that_grpc_does_not_read_is_refused_with_the_reason(own: Pair, change: Callable[[Pair], None]) -> None:
    change(own)
    with pytest.raises(UsageError, match="gRPC cannot use"):
        read_pair(own.certificate, own.key)


@pytest.mark.parametrize("change", GOOD_FORMS.values(), ids=list(GOOD_FORMS))
def test_a_form_that_grpc_reads_is_taken(own: Pair, shake: Callable[..., bool], change: Callable[[Pair], None]) -> None:
    change(own)
    assert shake(read_pair(own.certificate, own.key), read_authorities(own.certificate))


@pytest.mark.parametrize("kind", sorted(KEYS.keys() - USABLE))
def test_a_renewal_that_grpc_cannot_use_is_counted(make: Maker, own: Pair, kind: str) -> None:
    failures: list[None] = []
    certificates = Certificates(own.certificate, own.key, None, lambda: failures.append(None))
    renewed = make(kind)
    own.key.write_bytes(renewed.key.read_bytes())
    own.certificate.write_bytes(renewed.certificate.read_bytes())
    certificates.refresh()
    assert len(failures) == 1


def test_a_pipe_or_a_folder_is_no_key(own: Pair, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="cannot read"):
            read_pair(own.certificate, place)
