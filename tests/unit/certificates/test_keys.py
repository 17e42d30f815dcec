"""Keys as PEM files."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from guard.certificates import PrivateKey, PublicKey
from guard.errors import CertificateError, UsageError
from tests.unit.certificates.conftest import write_key


@pytest.mark.parametrize("name", ["ed", "ec"])
def test_what_one_key_signs_no_other_verifies(keys: Path, name: str) -> None:
    private = PrivateKey.read(keys / f"{name}.pem")
    public = PublicKey.read(keys / f"{name}.pub")
    assert private.public == public
    signature = private.sign(b"message")
    assert public.verifies(signature, b"message")
    assert not public.verifies(signature, b"messagf")
    assert not PublicKey.read(keys / "other.pub").verifies(signature, b"message")
    assert not public.verifies(b"", b"message")


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    path = write_key(tmp_path / "secret.pem", Ed25519PrivateKey.generate(), b"correct")
    assert PrivateKey.read(path, b"correct").public == PublicKey.read(tmp_path / "secret.pub")
    for passphrase, message in ((None, "is encrypted"), (b"wrong", "does not open")):
        with pytest.raises(UsageError, match=message):
            PrivateKey.read(path, passphrase)


def test_a_passphrase_for_a_key_without_one_is_an_error(keys: Path) -> None:
    with pytest.raises(UsageError, match="is not encrypted"):
        PrivateKey.read(keys / "ed.pem", b"secret")


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for key in (generate_private_key(SECP384R1()), generate_rsa(public_exponent=65537, key_size=2048)):
        path = tmp_path / "key.pem"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        with pytest.raises(CertificateError, match="neither an Ed25519 key"):
            PrivateKey.read(path)
        path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        with pytest.raises(CertificateError, match="neither an Ed25519 key"):
            PublicKey.read(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(CertificateError, match="is not a public key"):
        PublicKey.read(tmp_path / "key")
    with pytest.raises(CertificateError, match="is not a private key"):
        PrivateKey.read(tmp_path / "key")


def test_a_private_key_is_not_taken_for_a_public_one(keys: Path) -> None:
    with pytest.raises(CertificateError, match="keep this one secret"):
        PublicKey.read(keys / "ed.pem")
