"""Certificates of the demo's models, and a copy that was tampered with."""

import hashlib
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guard._files import replace_file
from guard.certificates import (
    CERTIFICATE_FILE,
    Admission,
    Policy,
    PrivateKey,
    certify,
    files_of_model,
    files_of_profile,
    verify,
)
from guard.classifiers.files import WEIGHTS_FILE

KEY_FILE = "demo.pub"
TAMPERED = "tampered copy of clean-twin"


def admissions(out: Path, *, seed: int) -> dict[str, Admission]:
    """Certify both models, and ask who is admitted: the clean one, the backdoored one, and a copy of the clean one.

    Args:
        out: Folder of the demo, with models and profiles; the public key is written there.
        seed: Seed of the key. It protects nothing, and everybody can make it again.
    """
    key = PrivateKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"guard demo %d" % seed).digest()))
    replace_file(out / KEY_FILE, key.public.to_pem())
    for name in ("clean-twin", "backdoored"):
        certify(out / "profiles" / name, str(out / "models" / name), [key])
    copy = out / "models" / "tampered"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out / "models" / "clean-twin", copy)
    with (copy / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-4, 2)
        last = file.read(1)
        file.seek(-4, 2)
        file.write(bytes([last[0] ^ 1]))
    policy = Policy.trusting([out / KEY_FILE])
    found = {}
    for label, model, profile in (
        ("clean-twin", "clean-twin", "clean-twin"),
        ("backdoored", "backdoored", "backdoored"),
        (TAMPERED, "tampered", "clean-twin"),
    ):
        folder = out / "profiles" / profile
        files = files_of_model(out / "models" / model) | files_of_profile(folder)
        found[label] = verify(folder / CERTIFICATE_FILE, files, [policy], model)
    return found
