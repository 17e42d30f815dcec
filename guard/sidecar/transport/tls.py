"""TLS: the certificate of the gRPC port, read again when it is renewed, and the connection to the upstream server."""

import logging
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from guard.errors import UsageError
from guard.sidecar.settings import Settings

log = logging.getLogger(__name__)

SYSTEM = "system"
_ED25519_KEY = b"MC4CAQAwBQYDK2Vw"
"""How a PKCS #8 file of such a key begins. gRPC would take it, and then fail every handshake."""


class Certificates:
    """Certificate, key and client authorities of the gRPC port.

    They are read again when a file changes; connections that stand are not touched. Files that do not make a whole are
    not taken: the old ones stay in use, and it is tried again at the next change. So a certificate may be written
    before its key.

    Args:
        certificate: PEM chain, the server's own certificate first.
        key: PEM private key of it, RSA or ECDSA, without a password.
        client_ca: PEM authorities; with it, a client without a certificate of theirs is turned away.
        on_failure: Called when changed files are not taken.

    Raises:
        UsageError: The files cannot be read or do not make a whole.
    """

    def __init__(
        self, certificate: Path, key: Path, client_ca: Path | None, on_failure: Callable[[], object] = lambda: None
    ) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._stamp = self._stamps()
        self._configuration = self._given = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; gRPC asks for the current certificate at each new connection."""
        return grpc.dynamic_ssl_server_credentials(
            self._given, self._renewed, require_client_authentication=self._client_ca is not None
        )

    def refresh(self) -> None:
        """Read the files again if they changed."""
        with self._lock:
            stamp = self._stamps()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._configuration = self._read()
            except UsageError as error:
                log.warning("the changed TLS files are not used, the old ones stay: %s", error)
                self._on_failure()
            else:
                log.info("the TLS files have changed and were read again")

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC has not seen yet; called on one of its threads, and must not raise."""
        self.refresh()
        with self._lock:
            if self._configuration is self._given:
                return None
            self._given = self._configuration
            return self._given

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file is written, replaced, or reached through another link."""
        return [_stamp(path) for path in (self._certificate, self._key, self._client_ca) if path is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key = read_pair(self._certificate, self._key)
        authorities = None if self._client_ca is None else read_authorities(self._client_ca)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def server_certificates(settings: Settings, on_failure: Callable[[], object] = lambda: None) -> Certificates | None:
    """The certificates that the settings name, if they name any."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca, on_failure)


def upstream_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """For the connection to the upstream server; None for one without TLS. Read once, at the start.

    Raises:
        UsageError: A file cannot be read or is of another kind.
    """
    if settings.upstream_tls is None:
        return None
    authorities = _system_authorities() if settings.upstream_tls == SYSTEM else Path(settings.upstream_tls)
    certificate = key = None
    if settings.upstream_certificate is not None and settings.upstream_key is not None:
        certificate, key = read_pair(settings.upstream_certificate, settings.upstream_key)
    return grpc.ssl_channel_credentials(read_authorities(authorities), key, certificate)


def upstream_channel(settings: Settings, options: Sequence[tuple[str, int | str]] = ()) -> grpc.aio.Channel:
    """A channel to the upstream server, with TLS if the settings ask for it.

    Args:
        settings: With an upstream.
        options: gRPC's, of the channel.

    Raises:
        UsageError: A file of certificates cannot be used.
    """
    credentials = upstream_credentials(settings)
    if credentials is None:
        return grpc.aio.insecure_channel(settings.upstream, options=options)
    return grpc.aio.secure_channel(settings.upstream, credentials, options=[*options, *name_options(settings)])


def name_options(settings: Settings) -> list[tuple[str, int | str]]:
    """The name that the upstream server's certificate must carry, where it is not the host of the address."""
    name = settings.upstream_server_name
    return [] if name is None else [("grpc.ssl_target_name_override", name)]


def read_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """A certificate chain and its private key, as PEM.

    Raises:
        UsageError: They cannot be read, do not belong together, or are not what gRPC can use.
    """
    pair = _read_file(certificate), _read_file(key)
    try:
        # A password is never asked for: nobody sits before a server.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UsageError(
            f"{certificate} and {key} are not a PEM certificate and the private key of it, without a password"
            f" ({_reason(error)})"
        ) from error
    if _ED25519_KEY in pair[1]:
        raise UsageError(f"{key} is an Ed25519 key, which gRPC cannot serve with; take an ECDSA or RSA key")
    if pair != (_read_file(certificate), _read_file(key)):
        raise UsageError(f"{certificate} or {key} changed while it was read")
    return pair


def read_authorities(path: Path) -> bytes:
    """Certificates of authorities, as PEM.

    Raises:
        UsageError: The file cannot be read or holds no certificate.
    """
    data = _read_file(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"{path} holds no PEM certificates of authorities ({_reason(error)})") from error
    return data


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _system_authorities() -> Path:
    """The machine's bundle; gRPC's own default is a list that came with its package."""
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile, f"{paths.capath}/ca-certificates.crt"):
        if path and Path(path).is_file():
            return Path(path)
    raise UsageError("this machine has no bundle of certificate authorities; set SSL_CERT_FILE, or name a file")
