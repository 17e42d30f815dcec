"""Who may sign models in the form of OpenSSF model signing: one key, or whoever an authority certified.

Vendors sign with a certificate, whose chain is in the bundle; what is pinned is their authority. These are keys of
others, on one of three curves, each with the hash that the specification gives it. guard's own certificates are signed
by `guard.certificates.keys`.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from guard._documents import read_bytes
from guard.errors import CertificateError

_MAX_PEM_BYTES = 1024 * 1024
_LONGEST_CHAIN = 8
_HASHES: Mapping[str, HashAlgorithm] = {SECP256R1.name: SHA256(), SECP384R1.name: SHA384(), SECP521R1.name: SHA512()}


@dataclass(frozen=True)
class Authority:
    """Who must have signed a model.

    Attributes:
        key: The key; None where an authority certifies keys.
        roots: The certificates of the authority; empty where one key is pinned.
        id: SHA-256 of what is pinned.
    """

    key: EllipticCurvePublicKey | None
    roots: tuple[x509.Certificate, ...]
    id: str

    @classmethod
    def read(cls, path: Path) -> "Authority":
        """Read a PEM file: a public key, or one or more certificates of authorities.

        Raises:
            CertificateError: The file cannot be read, or holds neither.
        """
        pem = read_bytes(path, _MAX_PEM_BYTES, CertificateError)
        try:
            if b"BEGIN CERTIFICATE" in pem:
                roots = tuple(x509.load_pem_x509_certificates(pem))
                pinned = b"".join(each.public_bytes(Encoding.DER) for each in roots)
                return cls(None, roots, hashlib.sha256(pinned).hexdigest())
            key = load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise CertificateError(f"{path} is neither a public key nor a certificate in PEM") from error
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _HASHES:
            raise CertificateError(f"{path} is not an ECDSA key on P-256, P-384 or P-521")
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return cls(key, (), hashlib.sha256(der).hexdigest())

    def signing_key(self, material: object, now: datetime) -> EllipticCurvePublicKey:
        """The key by which this authority signed, according to the verification material of a bundle.

        Raises:
            ValueError: The chain of certificates in the material does not lead to this authority, or is not in force.
        """
        if self.key is not None:
            return self.key
        chain = _chain(material)
        for position, (each, issuer) in enumerate(zip(chain, [*chain[1:], None], strict=True)):
            if not each.not_valid_before_utc <= now <= each.not_valid_after_utc:
                raise ValueError(f"certificate {position + 1} of its chain is not valid now")
            if each in self.roots and position:
                break
            above = [issuer] if issuer is not None else list(self.roots)
            if not any(_issued(candidate, each, position) for candidate in above):
                raise ValueError(f"certificate {position + 1} of its chain was not issued by the pinned authority")
        key = chain[0].public_key()
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _HASHES:
            raise ValueError("its certificate is not of an ECDSA key on P-256, P-384 or P-521")
        if not _may(chain[0], "digital_signature"):
            raise ValueError("its certificate is not one for signatures")
        return key


def verifies(key: EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether the owner of a key signed a message, with the hash of the key's curve."""
    try:
        key.verify(signature, message, ECDSA(_HASHES[key.curve.name]))
    except InvalidSignature:
        return False
    return True


def _chain(material: object) -> Sequence[x509.Certificate]:
    """The certificates of a bundle, the signer's first."""
    listed: Any = material.get("x509CertificateChain") if isinstance(material, Mapping) else None
    listed = listed.get("certificates") if isinstance(listed, Mapping) else None
    if not isinstance(listed, list) or not 1 <= len(listed) <= _LONGEST_CHAIN:
        raise ValueError(f"it holds no chain of 1 to {_LONGEST_CHAIN} certificates")
    try:
        return [x509.load_der_x509_certificate(base64.b64decode(each["rawBytes"], validate=True)) for each in listed]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError("its chain holds what is no certificate") from error


def _issued(issuer: x509.Certificate, subject: x509.Certificate, below: int) -> bool:
    """Whether one certificate issued another one, which has so many below it, and may do so."""
    try:
        subject.verify_directly_issued_by(issuer)
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False
    deep_enough = constraints.path_length is None or constraints.path_length >= below
    return constraints.ca and deep_enough and _may(issuer, "key_cert_sign")


def _may(certificate: x509.Certificate, use: str) -> bool:
    """Whether a certificate may be used so; one that says nothing about its use may."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return True
    except (ValueError, x509.DuplicateExtension):
        return False
    return bool(getattr(usage, use))
