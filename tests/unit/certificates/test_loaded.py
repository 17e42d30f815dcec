"""What commands that load a model say about its certificate."""

from pathlib import Path

from guard._documents import recording
from guard.certificates import CERTIFICATE_FILE, Policy
from guard.certificates.loaded import check_loaded
from guard.classifiers import load
from tests.unit.certificates.conftest import NOW


def test_a_loaded_model_is_compared_by_its_files_and_by_what_they_made(certified: Path, keys: Path) -> None:
    policies = [Policy.trusting([keys / "ed.pub"])]
    with recording() as opened:
        classifier = load(str(certified / "model"), device="cpu")

    def decide(digest: str) -> str:
        certificate = certified / "profile" / CERTIFICATE_FILE
        return str(check_loaded(str(certified / "model"), digest, opened, certificate, policies, now=NOW))

    assert decide(classifier.digest.root).startswith("certified by")
    assert "is not the one that was certified (its digest differs)" in decide("0" * 64)
    (certified / "model" / "tokenizer.json").write_text("{}")
    assert "model/tokenizer.json is not a file of the certificate" in decide(classifier.digest.root)
