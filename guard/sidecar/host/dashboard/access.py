"""Who may open the page: the names by which it is called, the password, and the certificates."""

import base64
import binascii
import hmac
import ipaddress
import logging
import ssl
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Self

from guard._documents import read_bytes
from guard._files import file_stamp
from guard.errors import UsageError
from guard.sidecar.settings import Settings
from guard.sidecar.transport.tls import read_authorities, read_pair

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

log = logging.getLogger(__name__)

MIN_TOKEN, _MAX_TOKEN = 16, 4096
_OWN_REQUESTS = {None, "same-origin", "none"}
"""What browsers say of requests that no other site has made; other programs say nothing."""


@dataclass(frozen=True)
class Refusal:
    """An answer to a request that is not answered otherwise.

    Attributes:
        status: Status of the answer.
        reason: Why, as a sentence.
        headers: Further headers.
    """

    status: HTTPStatus
    reason: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Access:
    """Decides whether a request is answered.

    Attributes:
        hosts: Names by which browsers may call the page, in small letters. `localhost` and IP addresses need not be
            among them: a page of somebody else can make its own name lead here (DNS rebinding), and no others.
        token: The password; None if none is asked for.
        tls: Context for TLS; None for plain HTTP.
    """

    hosts: frozenset[str] = frozenset()
    token: bytes | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The access that the settings of a sidecar allow.

        Raises:
            UsageError: A file cannot be read, or the password is too short.
        """
        tls = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            tls = tls_context(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        token = None if settings.dashboard_token is None else read_token(settings.dashboard_token)
        return cls(frozenset(name.lower().rstrip(".") for name in settings.dashboard_hosts), token, tls)

    def refusal(self, environ: "WSGIEnvironment") -> Refusal | None:
        """Why a request is refused; None if it is answered."""
        if not self._is_known(environ.get("HTTP_HOST", "")):
            return Refusal(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this page is not served under that name; --dashboard-hosts lists the names besides localhost",
            )
        if self.token is not None and not hmac.compare_digest(_password(environ), self.token):
            challenge = ("WWW-Authenticate", 'Basic realm="guard", charset="UTF-8"')
            return Refusal(HTTPStatus.UNAUTHORIZED, "the password is needed, see --dashboard-token", (challenge,))
        # A link from elsewhere may lead to the page, but no other site may make this browser ask for data.
        is_data = not environ["PATH_INFO"].startswith("/record/") and environ["PATH_INFO"] != "/"
        if is_data and environ.get("HTTP_SEC_FETCH_SITE") not in _OWN_REQUESTS:
            return Refusal(HTTPStatus.FORBIDDEN, "another site asked for this")
        return None

    def _is_known(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        if not colon or not port.isdecimal():
            name = host
        name = name.lower().rstrip(".")
        if name == "localhost" or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
        except ValueError:
            return False
        return True


def read_token(path: Path) -> bytes:
    """The password in a file, without white space around it.

    Raises:
        UsageError: The file cannot be read, or the password is too short.
    """
    token = read_bytes(path, _MAX_TOKEN, UsageError, missing=f"there is no file {path} with a password")
    # Some editors mark a file as UTF-8 at its beginning.
    token = token.removeprefix(b"\xef\xbb\xbf").strip()
    if len(token) < MIN_TOKEN:
        raise UsageError(f"the password in {path} has fewer than {MIN_TOKEN} characters; make a random one")
    return token


def tls_context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """The context of a port with TLS; a renewed certificate is read before the next connection.

    Args:
        certificate: PEM certificate chain.
        key: PEM private key for it.
        client_ca: PEM certificate authorities; if given, clients without a certificate of theirs are turned away. A
            change of this file needs a restart.

    Raises:
        UsageError: A file cannot be used.
    """
    read_pair(certificate, key)
    authorities = None if client_ca is None else read_authorities(client_ca).decode()
    context = current = _server_context(certificate, key, authorities)
    stamps = [file_stamp(certificate), file_stamp(key)]

    def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal current, stamps
        now = [file_stamp(certificate), file_stamp(key)]
        if now != stamps:
            stamps = now
            try:
                # A new one, since a pair that does not fit, half of it written, leaves a context without either.
                current = _server_context(certificate, key, authorities)
            except (OSError, ValueError) as error:
                log.warning("the changed TLS files are not used for the dashboard, the old ones stay in use: %s", error)
        connection.context = current

    # OpenSSL calls this at each handshake, whether or not the client names a host.
    context.sni_callback = renew
    return context


def _server_context(certificate: Path, key: Path, authorities: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key, password=lambda: "")
    if authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=authorities)
    return context


def _password(environ: "WSGIEnvironment") -> bytes:
    """The password of a request, as a browser sends it (Basic) or a program (Bearer)."""
    kind, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if kind.lower() == "bearer":
        return bytes(value.strip(), "latin-1", "replace")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
