"""Files for TLS: the certificate of a gRPC port, read again when it is renewed, and the credentials of a client."""

import logging
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc

from guard._documents import read_bytes
from guard._files import file_stamp
from guard.errors import UsageError
from guard.sidecar.transport import pem

log = logging.getLogger(__name__)

SYSTEM = "system"
"""Stands for the certificate authorities of this machine."""
_MAX_BYTES = 2**22
"""The most bytes of a file for TLS; the bundle of a machine has about 2**18."""


class Certificates:
    """Certificate, private key and client authorities of a gRPC port.

    The files are read again when one of them changes; existing connections are not affected. Files that do not belong
    together are not used: the old ones stay in use until the files change again. So a certificate may be written before
    its key.

    Args:
        certificate: PEM certificate chain, with the server's own certificate first.
        key: PEM private key of that certificate, RSA or ECDSA, without a password.
        client_ca: PEM certificate authorities of clients; if given, clients without a certificate are turned away.
        on_failure: Called when changed files cannot be used.

    Raises:
        UsageError: The files cannot be read or do not belong together.
    """

    def __init__(
        self, certificate: Path, key: Path, client_ca: Path | None, on_failure: Callable[[], object] = lambda: None
    ) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._stamp = self._stamps()
        self._configuration = self._handed_out = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for `add_secure_port`; gRPC asks for the current certificate at each new connection."""
        return grpc.dynamic_ssl_server_credentials(
            self._handed_out, self._renewed, require_client_authentication=self._client_ca is not None
        )

    def refresh(self, *, again: bool = False) -> None:
        """Read the files again if they have changed.

        Args:
            again: Whether they are read even if they seem to be the same.
        """
        with self._lock:
            stamp = self._stamps()
            if stamp == self._stamp and not again:
                return
            self._stamp = stamp
            try:
                self._configuration = self._read()
            except UsageError as error:
                log.warning("the changed TLS files are not used, the old ones stay in use: %s", error)
                self._on_failure()
            else:
                log.info("the TLS files were read again")

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration if gRPC has not seen it yet, else None.

        gRPC calls this on its own threads, and it must not raise.
        """
        self.refresh()
        with self._lock:
            if self._configuration is self._handed_out:
                return None
            self._handed_out = self._configuration
            return self._handed_out

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [file_stamp(path) for path in (self._certificate, self._key, self._client_ca) if path is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key = read_pair(self._certificate, self._key)
        authorities = None if self._client_ca is None else read_authorities(self._client_ca)
        if authorities is not None and not _is_taken((certificate, key), authorities):
            raise UsageError(f"gRPC cannot use {self._client_ca}")
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def server_certificates(
    certificate: Path | None,
    key: Path | None,
    client_ca: Path | None,
    on_failure: Callable[[], object] = lambda: None,
) -> Certificates | None:
    """The certificates of a port; None if no certificate is named, so that the port has no TLS.

    The arguments are those of `Certificates`.

    Raises:
        UsageError: The files cannot be read or do not belong together.
    """
    if certificate is None or key is None:
        return None
    return Certificates(certificate, key, client_ca, on_failure)


def client_credentials(
    authorities: str | None, certificate: Path | None, key: Path | None
) -> grpc.ChannelCredentials | None:
    """The credentials with which a client connects; None for a connection without TLS. The files are read once.

    Args:
        authorities: `SYSTEM`, or the path of a PEM file of certificate authorities; None for no TLS.
        certificate: PEM certificate that the client presents, if any.
        key: PEM private key of that certificate.

    Raises:
        UsageError: A file cannot be read or is not of the expected kind.
    """
    if authorities is None:
        return None
    if authorities == SYSTEM:
        # One certificate of a machine's hundred that gRPC cannot use is no reason to trust none of them.
        trusted = read_authorities(_system_authorities(), leave_out=True)
    else:
        trusted = read_authorities(Path(authorities))
    own_certificate = own_key = None
    if certificate is not None and key is not None:
        own_certificate, own_key = read_pair(certificate, key)
    return grpc.ssl_channel_credentials(trusted, own_key, own_certificate)


def read_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Read a certificate chain and its private key, both PEM, and make sure that gRPC can use them.

    Returns:
        Both as gRPC is to be given them: what was checked, and nothing else that the files contain.

    Raises:
        UsageError: The files cannot be read, do not belong together, or cannot be used by gRPC.
    """
    read = _read_file(certificate), _read_file(key)
    try:
        # Never ask for a password: there is nobody at the terminal of a server.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UsageError(
            f"{certificate} and {key} are not a PEM certificate and its private key without a password"
            f" ({_reason(error)})"
        ) from error
    pair = _usable(certificate, pem.certificate_chain, read[0]), _usable(key, pem.private_key, read[1])
    if not _is_taken(pair, None):
        raise UsageError(f"gRPC cannot use {certificate} and {key}; take an RSA key, or ECDSA on P-256 or P-384")
    if read != (_read_file(certificate), _read_file(key)):
        raise UsageError(f"{certificate} or {key} changed while it was read")
    return pair


def read_authorities(path: Path, *, leave_out: bool = False) -> bytes:
    """Read certificates of certificate authorities, as PEM, and make sure that gRPC can use them.

    Args:
        path: The file.
        leave_out: Whether those that gRPC cannot use are left out, as long as there are others.

    Returns:
        The certificates as gRPC is to be given them.

    Raises:
        UsageError: The file cannot be read, contains no certificate, or one that gRPC cannot use.
    """
    data = _read_file(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"{path} contains no PEM certificates of authorities ({_reason(error)})") from error
    return _usable(path, partial(pem.authorities, leave_out=leave_out), data)


def _usable(path: Path, read: Callable[[bytes], bytes], data: bytes) -> bytes:
    try:
        return read(data)
    except ValueError as error:
        raise UsageError(f"gRPC cannot use {path}: {error}") from error


def _is_taken(pair: tuple[bytes, bytes], authorities: bytes | None) -> bool:
    """Whether gRPC itself takes a certificate and its key: the last word, since its library knows more than we do.

    It looks at them when a port is opened, not earlier; nothing is ever accepted at this one.
    """
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(pair[1], pair[0])], authorities, authorities is not None)
    try:
        server.add_secure_port("127.0.0.1:0", credentials)
    except RuntimeError:
        return False
    finally:
        server.stop(None)
    return True


def _read_file(path: Path) -> bytes:
    return read_bytes(path, _MAX_BYTES, UsageError, missing=f"cannot read {path}: there is no such file")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")


def _system_authorities() -> Path:
    """This machine's bundle of certificate authorities; gRPC's own default is a list that comes with its package."""
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile, f"{paths.capath}/ca-certificates.crt"):
        if path and Path(path).is_file():
            return Path(path)
    raise UsageError("this machine has no bundle of certificate authorities; set SSL_CERT_FILE, or name a file")
