"""What every release wrote is read for ever: tests/kept holds profiles, evidence logs and certificates.

scripts/keep_artefacts.py writes them; a folder is added with each release, and none is changed.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.certificates import CERTIFICATE_FILE, TEST_RESULT_FILE, Envelope, Policy, PublicKey, verify
from guard.certificates.statement import TEST_RESULT, parse_time
from guard.evidence import EVIDENCE_FILE, EvidenceLog
from guard.profiles import Profile

KEPT = Path(__file__).parents[1] / "kept"
RELEASES = sorted(path.name for path in KEPT.iterdir())
PROFILES = [f"{release}/{name}" for release in RELEASES for name in ("with-base", "without-base")]


def expected(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PROFILES)
def test_a_kept_profile_has_its_verdict_and_gives_its_scores(name: str) -> None:
    profile, known = Profile.open(KEPT / name), expected(KEPT / f"{name}.json")
    verdict = profile.document.vetting.verdict
    assert {key: getattr(verdict, key) for key in known["verdict"]} == known["verdict"]
    assert profile.document.model.digest == known["model"]
    assert [record.id for record in profile.document.triggers] == known["triggers"]
    judgement = profile.detector().score(np.array(known["embeddings"], np.float32))
    np.testing.assert_allclose(judgement.scores.values, known["scores"], rtol=1e-4)
    np.testing.assert_array_equal(judgement.p_values, known["p_values"])
    np.testing.assert_array_equal(judgement.flags, known["flags"])


def test_kept_profiles_tell_clean_requests_from_triggered_ones() -> None:
    flags = [expected(KEPT / f"{release}/with-base.json")["flags"] for release in RELEASES]
    assert all(sum(row[:8]) <= 2 and all(row[8:]) for row in flags), flags


@pytest.mark.parametrize("release", RELEASES)
def test_a_kept_evidence_log_has_its_records(release: str, tmp_path: Path) -> None:
    # SQLite writes beside a log even if it only reads.
    log = EvidenceLog(Path(shutil.copy(KEPT / release / EVIDENCE_FILE, tmp_path)))
    found = [asdict(record) for record in log.after(0)]
    for record in found:
        record["thumbnail"] = record["thumbnail"] and record["thumbnail"].hex()
    # What a release did not know yet is empty.
    later = dict.fromkeys(("decided_by", "reference", "text"), "")
    assert found == [{**later, **record} for record in expected(KEPT / release / EVIDENCE_FILE)]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those of all releases that made any, and the one that the next release will keep."""
    pytest.importorskip("torch")
    from scripts.keep_artefacts import keep_certificate

    fresh = tmp_path_factory.mktemp("kept") / "certificate"
    keep_certificate(fresh)
    return [fresh, *sorted(KEPT.glob("*/certificate"))]


def test_a_kept_certificate_admits_what_it_is_about_and_nothing_else(certificates: list[Path], tmp_path: Path) -> None:
    for folder in certificates:
        known, key = expected(folder), folder / "vetting.pub"
        policy = tmp_path / "policy.toml"
        policy.write_text(
            'verdicts = ["no evidence", "inconclusive", "backdoored"]\n[[keys]]\nname = "kept"\n'
            f'pem = """\n{key.read_text(encoding="utf-8")}"""\n',
            encoding="utf-8",
        )
        now = parse_time(known["certified_at"])
        for files, admitted in ((known["files"], True), ({**known["files"], "profile/profile.json": "0" * 64}, False)):
            found = verify(folder / CERTIFICATE_FILE, files, [Policy.read(policy)], "kept", now=now)
            assert found.admitted is admitted, str(found)
            assert (found.verdict, found.model, found.expires_at) == tuple(
                known[name] for name in ("verdict", "model", "expires_at")
            )
        result = Envelope.from_json((folder / TEST_RESULT_FILE).read_bytes(), TEST_RESULT_FILE)
        assert result.signers([PublicKey.read(key)])
        assert json.loads(result.payload)["predicateType"] == TEST_RESULT
