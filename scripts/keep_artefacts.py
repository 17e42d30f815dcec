"""Write small profiles, an evidence log and a certificate as this guard writes them, with what it reads from them.

PYTHONPATH=CHECKOUT python scripts/keep_artefacts.py tests/kept/VERSION

Every release keeps what it wrote in tests/kept, and tests/unit/test_kept.py reads all of it with the guard at hand.
CHECKOUT is the root of the release, the code of which is to write.
"""

import json
import shutil
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import guard
from guard.classifiers import Classifier
from guard.evidence import EVIDENCE_FILE, EvidenceWriter, Record
from guard.vetting import Vetting, vet
from tests.conftest import CLASSES as CLASS_LIST
from tests.conftest import CONFIG, random_images, tiny_model
from tests.toy import checkerboard, toy

TARGET, CLASSES = 3, 6
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000008200813dd15a1b0000"
    "000049454e44ae426082"
)


def keep_profile(directory: Path, classifier: Classifier, base: Classifier | None, *, per_class: bool) -> None:
    """A calibrated profile, and scores of a few clean and a few triggered images."""
    vetting = vet(classifier, random_images(128), base=base, budget="quick", seed=0)
    profile = write_profile(directory, classifier, vetting, per_class=per_class)
    images = random_images(16, seed=2)
    images[8:] = (images[8:].float() + 40 * checkerboard()).round().clamp(0, 255).to(images.dtype)
    embeddings = classifier.embed(images).numpy().astype(np.float32)
    detector = profile.detector()
    judgement = (detector.score if hasattr(detector, "score") else detector.judge)(embeddings)  # judge: up to 0.1.0
    verdict = profile.document.vetting.verdict
    expected = {
        "verdict": {"outcome": verdict.outcome, "target": verdict.target, "p_value": verdict.p_value},
        "model": profile.document.model.digest,
        "triggers": [record.id for record in profile.document.triggers],
        "embeddings": embeddings.tolist(),
        "scores": judgement.scores.values.tolist(),
        "p_values": judgement.p_values.tolist(),
        "flags": judgement.flags.tolist(),
    }
    write_json(directory.with_suffix(".json"), expected)


def write_profile(directory: Path, classifier: Classifier, vetting: Vetting, *, per_class: bool) -> Any:  # noqa: ANN401
    """Calibrate and write by the names of this release; returns the profile."""
    profiles: Any = import_module("guard.profiles")
    images = random_images(400, seed=1)
    if hasattr(profiles, "build"):  # up to 0.1.0
        profile = profiles.build(classifier, vetting)
        profile = profiles.calibrate(profile, classifier, images, 0.05, per_class=per_class)
        profiles.write(profile, directory, report="")
    else:
        profile = profiles.Profile.build(classifier, vetting)
        profile = profile.calibrate(classifier, images, 0.05, per_class=per_class)
        profile.save(directory)
    return profile


def keep_evidence(path: Path) -> None:
    """An evidence log of three records, one of them with everything in it."""
    common: dict[str, Any] = {
        "model": "classifier",
        "model_digest": "sha256:" + "0" * 64,
        "decision": "flag",
        "mode": "tag",
    }
    records = [
        Record("first", image=0, time="2025-01-02T03:04:05.678Z", **common),
        Record(
            "second",
            image=3,
            time="2025-01-02T03:04:06Z",
            trace_id="0af7651916cd43dd8448eb211c80319c",
            predicted="class 3",
            p_value=0.001,
            alpha=0.01,
            scores={"match": 4.5, "density": 1.25},
            thresholds={"match": 3.0},
            trigger="patch-3",
            target="class 3",
            second_look="confirmed",
            explanation="without the trigger the answer is 'class 1'",
            input_digest="1" * 64,
            thumbnail=PNG,
            **common,
        ),
        Record("third \N{GREEK SMALL LETTER PI}", image=0, time="2025-01-02T03:04:07Z", **common),
    ]
    writer = EvidenceWriter(path)
    if not all(writer.record(record) for record in records) or not writer.close(60):
        raise SystemExit(f"{path} could not be written")
    kept = [asdict(record) | {"id": number} for number, record in enumerate(records, 1)]
    for record in kept:
        record["thumbnail"] = record["thumbnail"] and record["thumbnail"].hex()
    write_json(path.with_suffix(".json"), kept)


def keep_certificate(directory: Path) -> None:
    """A certificate, the key that signed it, and what it is about; the private key is thrown away."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from guard.certificates import PrivateKey, certify
    from guard.classifiers import load, save

    key = PrivateKey(Ed25519PrivateKey.generate())
    with TemporaryDirectory() as temporary:
        model, profile = Path(temporary) / "model", Path(temporary) / "profile"
        save(model, tiny_model(0), CONFIG, CLASS_LIST)
        classifier = load(str(model), device="cpu")
        vetting = vet(classifier, random_images(128), base=None, budget="quick", seed=0)
        write_profile(profile, classifier, vetting, per_class=False)
        made = certify(profile, str(model), [key], days=3650)
        directory.mkdir()
        for name in ("certificate.json", "test-result.json"):
            shutil.copy(profile / name, directory)
    (directory / "vetting.pub").write_bytes(key.public.to_pem())
    predicate = made.statement.predicate
    expected = {
        "files": made.statement.files,
        "verdict": predicate.verdict.outcome,
        "model": predicate.model.digest,
        "certified_at": predicate.certified_at,
        "expires_at": predicate.expires_at,
    }
    write_json(directory.with_suffix(".json"), expected)


def write_json(path: Path, document: object) -> None:
    """A JSON file that people can read in a diff."""
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Replace the folder that is named on the command line."""
    out = Path(sys.argv[1])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    keep_profile(out / "with-base", toy(CLASSES, target=TARGET, jitter=0.02), toy(CLASSES), per_class=False)
    keep_profile(out / "without-base", toy(CLASSES, jitter=0.02), None, per_class=True)
    keep_evidence(out / EVIDENCE_FILE)
    keep_certificate(out / "certificate")
    sys.stderr.write(f"guard {guard.__version__} at {Path(guard.__file__).parent} wrote {out}\n")


if __name__ == "__main__":
    main()
