"""`guard certify` and `guard verify`, as a person at the terminal sees them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import guard as package
from guard.certificates import CERTIFICATE_FILE
from guard.profiles import Profile
from guard.vetting import Conclusion, Verdict
from tests.program import guard
from tests.unit.certificates.conftest import keys, without_evidence, write_key

__all__ = ["keys"]


@pytest.fixture
def vetted(profile: Profile, model_directory: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_directory, tmp_path / "model")
    without_evidence(profile).save(tmp_path / "profile")
    return tmp_path


def certify(folder: Path, *more: object) -> str:
    done = guard("certify", folder / "profile", "--model", folder / "model", *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def verify(folder: Path, *more: object) -> tuple[int, str]:
    done = guard("verify", folder / "model", "--profile", folder / "profile", *more)
    return done.returncode, done.stdout or done.stderr


def test_a_certified_model_is_admitted_and_a_changed_one_is_not(vetted: Path, exported: Path, keys: Path) -> None:
    said = certify(vetted, "--key", keys / "ed.pem", "--exported", exported, "--vetter", "me", "--days", 7)
    assert "verdict: no evidence" in said
    assert "export: differs by up to" in said
    code, said = verify(vetted, "--trust", keys / "ed.pub")
    assert (code, said.startswith("certified by")) == (0, True)
    (vetted / "model" / "classes.json").write_text("{}", encoding="utf-8")
    code, said = verify(vetted, "--trust", keys / "ed.pub")
    assert code == 1
    assert said.startswith("refused by the rule subject of --trust: model/classes.json is not the file")


def test_results_for_ci_systems_do_not_change_the_exit_code(vetted: Path, keys: Path) -> None:
    certify(vetted, "--key", keys / "ed.pem")
    sarif, junit = vetted / "r.sarif", vetted / "r.xml"
    for trusted, code, kind, failures in (("ed", 0, "pass", "0"), ("other", 1, "fail", "1")):
        found, _ = verify(vetted, "--trust", keys / f"{trusted}.pub", "--sarif", sarif, "--junit", junit)
        assert found == code
        (result,) = json.loads(sarif.read_text())["runs"][0]["results"]
        assert (result["kind"], result["ruleId"]) == (kind, "guard/certificate")
        assert fromstring(junit.read_text()).get("failures") == failures  # noqa: S314 - written just now


def test_inconclusive_is_code_3_and_never_silent(vetted: Path, keys: Path) -> None:
    stored = Profile.open(vetted / "profile")
    vetting = stored.document.vetting
    unsure = replace(vetting, verdict=replace(vetting.verdict, outcome="inconclusive"))
    replace(stored, document=replace(stored.document, vetting=unsure)).save(vetted / "profile")
    certify(vetted, "--key", keys / "ed.pem")
    sarif, junit = vetted / "r.sarif", vetted / "r.xml"
    code, said = verify(vetted, "--trust", keys / "ed.pub", "--sarif", sarif, "--junit", junit)
    assert (code, "the verdict is 'inconclusive'" in said) == (3, True)
    assert json.loads(sarif.read_text())["runs"][0]["results"][0]["kind"] == "open"
    (failure,) = fromstring(junit.read_text()).iter("failure")  # noqa: S314 - as above
    assert failure.get("type") == "inconclusive"
    policy = vetted / "policy.toml"
    policy.write_text(f'verdicts = ["inconclusive"]\n[[keys]]\nname = "a"\nfile = "{keys / "ed.pub"}"\n')
    assert verify(vetted, "--policy", policy)[0] == 0


def test_a_signature_of_the_model_is_written_and_demanded(vetted: Path, keys: Path) -> None:
    certify(vetted, "--key", keys / "ec.pem", "--oms-signature", vetted / "model.sig")
    trust = ("--trust", keys / "ec.pub", "--oms-key", keys / "ec.pub")
    assert verify(vetted, *trust, "--oms-signature", vetted / "model.sig")[0] == 0
    code, said = verify(vetted, *trust)
    assert (code, "refused by the rule model_signing" in said) == (1, True)
    (vetted / "model" / "README.md").write_text("more", encoding="utf-8")
    code, said = verify(vetted, *trust, "--oms-signature", vetted / "model.sig")
    assert (code, "README.md is not among the files" in said) == (1, True)


def test_an_encrypted_key_takes_its_passphrase_from_the_environment(
    vetted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = write_key(tmp_path / "secret.pem", Ed25519PrivateKey.generate(), b"correct")
    monkeypatch.setenv("GUARD_KEY_PASSPHRASE", "correct")
    certify(vetted, "--key", key)
    monkeypatch.setenv("GUARD_KEY_PASSPHRASE", "wrong")
    done = guard("certify", vetted / "profile", "--model", vetted / "model", "--key", key)
    assert (done.returncode, "does not open the key" in done.stderr) == (2, True)
    assert verify(vetted, "--trust", tmp_path / "secret.pub")[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give --trust KEY.pub or --policy FILE"),
        (("--oms-key", "ec.pub"), "--oms-key needs --trust"),
        (("--trust", "ed.pub", "--oms-signature", "x"), "--oms-signature needs --oms-key"),
        (("--trust", "ed.pub", "--vet-on-miss", "quick"), "--vet-on-miss needs --images"),
        (("--trust", "ed.pub", "--images", "x"), "--vet-on-miss needs --images"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    vetted: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(keys)
    code, said = verify(vetted, *more)
    assert code == 2
    assert message in said


@pytest.mark.parametrize(("outcome", "code"), [("no evidence", 0), ("backdoored", 1), ("inconclusive", 3)])
def test_a_model_without_certificate_is_vetted_if_that_is_asked_for(
    vetted: Path, keys: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, outcome: Conclusion, code: int
) -> None:
    class Vetted:
        verdict = Verdict(outcome, None, 0.5, ("patch",), 0.01, ("a reason",))

    monkeypatch.setattr(package, "vet", lambda *_, **__: Vetted, raising=False)
    asked = ("--trust", keys / "ed.pub", "--vet-on-miss", "quick", "--images", image_folder)
    found, said = verify(vetted, *asked)
    assert found == code
    assert f"not certified; vetted now (quick): {outcome}: a reason" in said
    # Taking the certificate away does not admit what is revoked.
    policy = vetted / "policy.toml"
    digest = Profile.open(vetted / "profile").document.model.digest
    policy.write_text(f'[[revoked]]\ndigest = "{digest}"\n[[keys]]\nname = "a"\nfile = "{keys / "ed.pub"}"\n')
    found, said = verify(vetted, "--policy", policy, *asked[2:])
    assert (found, "was revoked" in said) == (1, True)
    # With a certificate, that one counts.
    certify(vetted, "--key", keys / "ed.pem")
    assert (vetted / "profile" / CERTIFICATE_FILE).exists()
    assert verify(vetted, *asked)[0] == 0
