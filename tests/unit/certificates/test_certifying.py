"""Making certificates, and accepting them."""

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from guard.certificates import (
    CERTIFICATE_FILE,
    PREDICATE_TYPE,
    TEST_RESULT_FILE,
    Envelope,
    Policy,
    PrivateKey,
    Statement,
    certify,
    files_of_model,
    files_of_profile,
    verify,
)
from guard.certificates.statement import TEST_RESULT
from guard.classifiers import ClassList
from guard.errors import CertificateError, ProfileError, UsageError
from guard.profiles import Profile
from guard.vetting import TextSearchSettings, TextVetting
from guard.vetting.text_results import PromptAssimilation, TextTriggerRecord
from tests.unit.certificates.conftest import NOW, without_evidence


def statement(folder: Path) -> Statement:
    envelope = Envelope.from_json((folder / "profile" / CERTIFICATE_FILE).read_bytes(), CERTIFICATE_FILE)
    return Statement.parse(envelope.payload)


@pytest.mark.parametrize("part", ["model", "exported"])
@pytest.mark.parametrize("key", ["ed", "ec"])
def test_what_was_certified_is_admitted(certified: Path, keys: Path, part: str, key: str) -> None:
    files = files_of_model(certified / part)
    files |= files_of_profile(certified / "profile")
    policy = Policy.trusting([keys / f"{key}.pub"])
    found = verify(certified / "profile" / CERTIFICATE_FILE, files, [policy], part, now=NOW)
    assert found.admitted, str(found)
    assert list(found.signers) == [str(keys / f"{key}.pub")]
    assert found.verdict == "no evidence"
    assert found.expires == NOW + timedelta(days=90)
    assert json.loads(found.to_json())["admitted"] is True


def test_a_certificate_names_every_file(certified: Path) -> None:
    names = statement(certified).files
    assert {name.partition("/")[0] for name in names} == {"model", "exported", "profile"}
    for part in ("model", "exported", "profile"):
        there = {path.name for path in (certified / part).iterdir()} - {CERTIFICATE_FILE, TEST_RESULT_FILE}
        assert {name.partition("/")[2] for name in names if name.startswith(f"{part}/")} == there


def test_a_certificate_says_what_the_profile_says(certified: Path) -> None:
    predicate, document = statement(certified).predicate, Profile.open(certified / "profile").document
    assert predicate.verdict.outcome == document.vetting.verdict.outcome
    assert predicate.model.parts == document.model.parts
    assert [method.family for method in predicate.methods] == [each.family for each in document.vetting.results]
    assert [each.id for each in predicate.triggers] == [each.id for each in document.triggers]
    assert predicate.screening is not None
    assert document.calibration is not None
    assert predicate.screening.threshold == document.calibration.threshold.value
    assert predicate.scope.budget == "quick"
    assert predicate.parity is not None
    assert predicate.parity.max_difference < 1e-4
    assert predicate.evaluation.passed


def test_the_generic_result_is_signed_too(certified: Path, keys: Path) -> None:
    envelope = Envelope.from_json((certified / "profile" / TEST_RESULT_FILE).read_bytes(), TEST_RESULT_FILE)
    assert envelope.signers([PrivateKey.read(keys / "ed.pem").public])
    document = json.loads(envelope.payload)
    assert document["predicateType"] == TEST_RESULT
    assert document["predicate"]["result"] == "PASSED"
    assert document["predicate"]["passedTests"] == ["backdoor-vetting/quick"]
    assert len(document["subject"]) == len(statement(certified).subject)


def test_the_schema_is_the_one_of_the_statement() -> None:
    text = resources.files("guard.certificates").joinpath("backdoor-vetting-v1.schema.json").read_text(encoding="utf-8")
    assert json.loads(text) == Statement.model_json_schema(by_alias=True)
    assert PREDICATE_TYPE in text


def test_a_statement_of_a_later_guard_is_read(certified: Path) -> None:
    """Fields that a later version adds are ignored, as in-toto asks for."""
    document = json.loads(statement(certified).to_json())
    document["predicate"]["added"] = document["predicate"]["scope"]["added"] = 1
    assert Statement.parse(json.dumps(document).encode()) == statement(certified)


def test_another_model_than_that_of_the_profile_is_not_certified(certified: Path, keys: Path) -> None:
    (certified / "model" / "classes.json").write_text('{"classes": ["cat", "dog", "bird"]}', encoding="utf-8")
    with pytest.raises(CertificateError, match="not the class list that the model was vetted with"):
        certify(certified / "profile", str(certified / "model"), [PrivateKey.read(keys / "ed.pem")])


def test_an_export_of_another_model_is_not_certified(certified: Path, keys: Path) -> None:
    manifest = certified / "exported" / "classifier.json"
    manifest.write_text(
        manifest.read_text().replace(Profile.open(certified / "profile").document.model.digest, "0" * 64)
    )
    with pytest.raises(CertificateError, match="is the export of another model"):
        certify(
            certified / "profile", str(certified / "model"), [PrivateKey.read(keys / "ed.pem")],
            exported=certified / "exported",
        )  # fmt: skip


def test_a_profile_of_another_model_is_not_certified(profile: Profile, certified: Path, keys: Path) -> None:
    honest = without_evidence(profile)
    classes = honest.document.model.classes
    other = replace(honest.document.model, classes=ClassList(tuple(reversed(classes.names)), classes.templates))
    shutil.rmtree(certified / "profile")
    (certified / "model" / "classes.json").unlink()
    replace(honest, document=replace(honest.document, model=other)).save(certified / "profile")
    with pytest.raises(ProfileError, match="of another model"):
        certify(certified / "profile", str(certified / "model"), [PrivateKey.read(keys / "ed.pem")])


def test_a_model_with_a_number_that_is_not_finite_is_not_certified(certified: Path, keys: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = certified / "model" / "open_clip_model.safetensors"
    tensors = load_file(path)
    name = next(name for name, values in tensors.items() if values.ndim > 1)
    tensors[name].flat[0] = np.nan
    save_file(tensors, path)
    with pytest.raises(Exception, match="is not finite"):
        certify(certified / "profile", str(certified / "model"), [PrivateKey.read(keys / "ed.pem")])


@pytest.mark.parametrize("days", [0, -1, 4000])
def test_days_that_are_out_of_range_are_refused(certified: Path, keys: Path, days: float) -> None:
    with pytest.raises(UsageError, match="valid for more than 0"):
        certify(certified / "profile", str(certified / "model"), [PrivateKey.read(keys / "ed.pem")], days=days)


def test_a_profile_of_the_text_tower_alone_is_not_certified(certified: Path, keys: Path, tmp_path: Path) -> None:
    profile = Profile.open(certified / "profile")
    vetting = replace(profile.document.vetting, results=())
    text = TextVetting(
        vetting.verdict,
        (),
        TextTriggerRecord("text token", "end", "zz", 0.1, 0.0, 0.0, (), (), (1.0,) * profile.document.model.embedding),
        PromptAssimilation((0.5,), (0.5,), (0.5,)),
        TextSearchSettings(),
        (48, 48),
        vetting.reference_model,
        "cpu",
        1.0,
        100,
    )
    document = replace(profile.document, vetting=vetting, text=text)
    replace(profile, document=document).save(tmp_path / "profile")
    with pytest.raises(CertificateError, match="text tower alone"):
        certify(tmp_path / "profile", str(certified / "model"), [PrivateKey.read(keys / "ed.pem")])
