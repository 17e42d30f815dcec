"""Keys that sign certificates: Ed25519 and ECDSA P-256, as PEM files."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from guard._documents import read_bytes
from guard.errors import CertificateError, UsageError

_MAX_PEM_BYTES = 64 * 1024


@dataclass(frozen=True)
class PublicKey:
    """A public key, known by its bytes and not by a name: the same key under two names is one key.

    Attributes:
        der: The key as a SubjectPublicKeyInfo in DER.
    """

    der: bytes

    @classmethod
    def read(cls, path: Path) -> "PublicKey":
        """Read a PEM file.

        Raises:
            CertificateError: The file cannot be read, or holds no public key of a kind that guard accepts.
        """
        return cls.from_pem(read_bytes(path, _MAX_PEM_BYTES, CertificateError), str(path))

    @classmethod
    def from_pem(cls, pem: bytes, where: str) -> "PublicKey":
        """The key of a PEM text.

        Args:
            pem: The text.
            where: Where it comes from, for errors.

        Raises:
            CertificateError: It holds no public key of a kind that guard accepts.
        """
        if b"PRIVATE KEY" in pem:
            raise CertificateError(f"{where} holds a private key; give the public one, and keep this one secret")
        try:
            key = load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise CertificateError(f"{where} is not a public key in PEM") from error
        if not _is_accepted(key):
            raise CertificateError(f"{where} is neither an Ed25519 key nor an ECDSA key on P-256")
        return cls(_der(key))

    @property
    def id(self) -> str:
        """SHA-256 of the key's bytes, hexadecimal: the key id that guard writes."""
        return hashlib.sha256(self.der).hexdigest()

    @cached_property
    def ids(self) -> frozenset[str]:
        """The names that a signature may give this key: guard's own, and that of securesystemslib."""
        is_ed25519 = isinstance(self._key, Ed25519PublicKey)
        if isinstance(self._key, Ed25519PublicKey):
            public = self._key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
        else:
            public = self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        described = {
            "keytype": "ed25519" if is_ed25519 else "ecdsa",
            "keyval": {"public": public},
            "scheme": "ed25519" if is_ed25519 else "ecdsa-sha2-nistp256",
        }
        # Canonical JSON as securesystemslib writes it: of control characters, none is escaped.
        text = json.dumps(described, sort_keys=True, separators=(",", ":")).replace("\\n", "\n")
        return frozenset({self.id, hashlib.sha256(text.encode()).hexdigest()})

    @property
    def algorithm(self) -> str:
        """`Ed25519` or `ECDSA P-256`."""
        return "Ed25519" if isinstance(self._key, Ed25519PublicKey) else "ECDSA P-256"

    def to_pem(self) -> bytes:
        """The key as PEM."""
        return self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this key's owner signed the message."""
        try:
            if isinstance(self._key, Ed25519PublicKey):
                self._key.verify(signature, message)
            else:
                self._key.verify(signature, message, ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True

    @cached_property
    def _key(self) -> Ed25519PublicKey | EllipticCurvePublicKey:
        key = load_der_public_key(self.der)
        assert isinstance(key, Ed25519PublicKey | EllipticCurvePublicKey), "others are refused when a key is read"  # noqa: S101
        return key


class PrivateKey:
    """A key that signs.

    Args:
        key: The key.

    Attributes:
        public: The public key that belongs to it.
    """

    def __init__(self, key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = PublicKey(_der(key.public_key()))

    @classmethod
    def read(cls, path: Path, passphrase: bytes | None = None) -> "PrivateKey":
        """Read a PEM file.

        Args:
            path: The file.
            passphrase: What the key is encrypted with; None if it is not.

        Raises:
            CertificateError: The file cannot be read, or holds no private key of a kind that guard accepts.
            UsageError: The key is encrypted and the passphrase is missing or wrong, or it is not encrypted and there is
                a passphrase.
        """
        data = read_bytes(path, _MAX_PEM_BYTES, CertificateError)
        try:
            key = load_pem_private_key(data, passphrase)
        except TypeError as error:
            if passphrase is None:
                raise UsageError(f"the key {path} is encrypted; give its passphrase") from error
            raise UsageError(f"the key {path} is not encrypted; give no passphrase") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            if passphrase is not None and b"ENCRYPTED" in data:
                raise UsageError(f"the passphrase does not open the key {path}") from error
            raise CertificateError(f"{path} is not a private key in PEM") from error
        if not isinstance(key, Ed25519PrivateKey | EllipticCurvePrivateKey) or not _is_accepted(key.public_key()):
            raise CertificateError(f"{path} is neither an Ed25519 key nor an ECDSA key on P-256")
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """A signature of the message: 64 bytes by Ed25519, or DER by ECDSA with SHA-256."""
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(message)
        return self._key.sign(message, ECDSA(SHA256()))


def _is_accepted(key: object) -> bool:
    return isinstance(key, Ed25519PublicKey) or (
        isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
    )


def _der(key: object) -> bytes:
    if not isinstance(key, Ed25519PublicKey | EllipticCurvePublicKey):
        raise TypeError(type(key))
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
