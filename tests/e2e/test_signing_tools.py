"""Certificates and other tools, each in an environment of its own, in both directions."""

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from guard.certificates import CERTIFICATE_FILE, TEST_RESULT_FILE, Envelope, PrivateKey, PublicKey
from guard.certificates.authorities import Authority
from guard.certificates.model_signing import check_bundle, write_bundle
from guard.errors import CertificateError
from tests.e2e.environments import environment
from tests.unit.certificates.conftest import certified, certified_once, keys
from tests.unit.certificates.test_authorities import NOW, certificate

__all__ = ["certified", "certified_once", "keys"]
TOOLS = Path(__file__).parent / "signing_tools"


@pytest.fixture(scope="module")
def tools() -> Path:
    return environment(TOOLS / "requirements.txt")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", [CERTIFICATE_FILE, TEST_RESULT_FILE])
@pytest.mark.parametrize("key", ["ed", "ec"])
def test_securesystemslib_and_in_toto_read_what_guard_signs(
    tools: Path, certified: Path, keys: Path, file: str, key: str
) -> None:
    done = run(tools, TOOLS / "ask.py", "dsse", certified / "profile" / file, keys / f"{key}.pub")
    assert done.returncode == 0, done.stderr
    done = run(tools, TOOLS / "ask.py", "dsse", certified / "profile" / file, keys / "other.pub")
    assert done.returncode != 0


@pytest.mark.parametrize("key", ["ed", "ec"])
def test_guard_reads_what_securesystemslib_signs(tools: Path, keys: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "payload").write_bytes(b'{"any": "payload"}')
    done = run(tools, TOOLS / "ask.py", "sign", tmp_path / "payload", keys / f"{key}.pem", tmp_path / "envelope")
    assert done.returncode == 0, done.stderr
    envelope = Envelope.from_json((tmp_path / "envelope").read_bytes(), "envelope")
    own = PublicKey.read(keys / f"{key}.pub")
    assert envelope.payload == b'{"any": "payload"}'
    assert envelope.signers([PublicKey.read(keys / "other.pub"), own]) == (own,)


def test_model_signing_accepts_the_bundle_that_guard_writes(tools: Path, certified: Path, keys: Path) -> None:
    bundle = certified / "model" / "model.sig"
    write_bundle(certified / "model", bundle, PrivateKey.read(keys / "ec.pem"))
    verify = (tools, "-m", "model_signing", "verify", "key", certified / "model", "--signature", bundle)
    done = run(*verify, "--public_key", keys / "ec.pub")
    assert done.returncode == 0, done.stdout + done.stderr
    with (certified / "model" / "open_clip_config.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    assert run(*verify, "--public_key", keys / "ec.pub").returncode != 0


def test_guard_accepts_the_bundle_that_model_signing_writes(tools: Path, certified: Path, keys: Path) -> None:
    model, bundle = certified / "model", certified / "model" / "model.sig"
    done = run(
        tools, "-m", "model_signing", "sign", "key", model, "--signature", bundle, "--private_key", keys / "ec.pem"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    opened = ["open_clip_config.json", "open_clip_model.safetensors", "classes.json"]
    check_bundle(model, bundle, Authority.read(keys / "ec.pub"), opened)
    (model / "classes.json").unlink()
    with pytest.raises(CertificateError, match="is missing"):
        check_bundle(model, bundle, Authority.read(keys / "ec.pub"), opened)


def test_guard_follows_the_chain_that_model_signing_writes(tools: Path, certified: Path, tmp_path: Path) -> None:
    root = certificate("root", None, ca=True, days=3650)
    leaf, key = certificate("leaf", root, ca=False, days=3650)
    pem = {"leaf.pem": leaf.public_bytes(Encoding.PEM), "root.pem": root[0].public_bytes(Encoding.PEM)}
    pem["key.pem"] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for name, data in pem.items():
        (tmp_path / name).write_bytes(data)
    model, bundle = certified / "model", certified / "model" / "model.sig"
    done = run(
        tools, "-m", "model_signing", "sign", "certificate", model, "--signature", bundle,
        "--private_key", tmp_path / "key.pem", "--signing_certificate", tmp_path / "leaf.pem",
        "--certificate_chain", tmp_path / "root.pem",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_bundle(model, bundle, Authority.read(tmp_path / "root.pem"), ["classes.json"], now=NOW)
