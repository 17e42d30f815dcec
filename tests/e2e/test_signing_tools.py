"""Certificates and other tools, each in an environment of its own, in both directions."""

import subprocess
from pathlib import Path

import pytest

from guard.certificates import CERTIFICATE_FILE, TEST_RESULT_FILE, Envelope, PrivateKey, PublicKey
from guard.certificates.model_signing import check_bundle, write_bundle
from guard.errors import CertificateError
from tests.e2e.environments import environment
from tests.unit.certificates.conftest import certified, certified_once, keys

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
    check_bundle(model, bundle, PublicKey.read(keys / "ec.pub"), opened)
    (model / "classes.json").unlink()
    with pytest.raises(CertificateError, match="is missing"):
        check_bundle(model, bundle, PublicKey.read(keys / "ec.pub"), opened)
