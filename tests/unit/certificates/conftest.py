"""A model that was certified, and the keys of two people who vet."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from guard.certificates import PrivateKey, certify
from guard.profiles import Profile

NOW = datetime(2026, 7, 1, tzinfo=UTC)


def write_key(path: Path, key: object, passphrase: bytes | None = None) -> Path:
    """A private key as PEM, and its public key beside it, as NAME.pub."""
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))  # type: ignore[attr-defined]
    path.with_suffix(".pub").write_bytes(PrivateKey(key).public.to_pem())  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys ed.pem, ec.pem and other.pem, and their public ones."""
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder / "ed.pem", Ed25519PrivateKey.generate())
    write_key(folder / "ec.pem", generate_private_key(SECP256R1()))
    write_key(folder / "other.pem", Ed25519PrivateKey.generate())
    return folder


def without_evidence(profile: Profile) -> Profile:
    """The same profile with another verdict."""
    vetting = profile.document.vetting
    verdict = replace(vetting.verdict, outcome="no evidence", target=None)
    document = replace(profile.document, vetting=replace(vetting, verdict=verdict), created="2026-06-01T00:00:00+00:00")
    return replace(profile, document=document)


@pytest.fixture(scope="session")
def certified_once(
    profile: Profile, model_directory: Path, exported: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("certified")
    shutil.copytree(model_directory, folder / "model")
    shutil.copytree(exported, folder / "exported")
    without_evidence(profile).save(folder / "profile")
    signing = [PrivateKey.read(keys / "ed.pem"), PrivateKey.read(keys / "ec.pem")]
    certify(folder / "profile", str(folder / "model"), signing, exported=folder / "exported", now=NOW)
    return folder


@pytest.fixture
def certified(certified_once: Path, tmp_path: Path) -> Path:
    """A folder with model, exported and profile, the last with a certificate of NOW; fresh for each test."""
    return Path(shutil.copytree(certified_once, tmp_path / "certified"))
