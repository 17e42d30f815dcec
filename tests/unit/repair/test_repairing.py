"""The outcome: what may be called repaired, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guard.certificates import Policy, PrivateKey
from guard.certificates.revocation import revocation, revoke
from guard.classifiers import Classifier, load
from guard.errors import CertificateError, ImageError, UsageError
from guard.profiles import Profile
from guard.repair import (
    Candidate,
    Images,
    Realign,
    Repaired,
    Switch,
    TargetedTrigger,
    TuningSettings,
    check_place,
    measure,
    read_pairs,
    repair,
    revoked_digests,
    summary,
    write,
)
from guard.vetting import TextVetting, Verdict, Vetting
from tests.conftest import random_images, tiny_model
from tests.unit.repair.conftest import Backdoored
from tests.zoo import FakeVetting

ACCUSED = Verdict("backdoored", 1, 1e-5, ("additive",), 0.01, ("a trigger was found",))
NO_EVIDENCE = Verdict("no evidence", None, 0.5, ("additive",), 0.01, ())
METHOD = Realign(tuning=TuningSettings(steps=60, batch=32, learning_rate=2e-3, weight_decay=0.0))


class Vet:
    """Stands for `vet`: gives these outcomes one after the other, the last for ever."""

    def __init__(self, *outcomes: str) -> None:
        self.outcomes = list(outcomes)
        self.suspects: list[str] = []

    def __call__(self, classifier: Classifier, images: object, **_: object) -> Vetting:
        self.suspects.append(classifier.digest.root)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        guilty = ("toy",) if outcome == "backdoored" else ()
        vetting = FakeVetting(*guilty)(classifier.with_model(classifier.model, "toy"), images)  # type: ignore[arg-type]
        return replace(vetting, verdict=replace(vetting.verdict, outcome=outcome, reasons=("said so",)))  # type: ignore[arg-type]


def repaired(
    monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored, *outcomes: str, **more: object
) -> tuple[Repaired, Vet]:
    fake = Vet(*outcomes)
    monkeypatch.setattr("guard.repair.repairing.vet", fake)
    arguments = {"verdict": ACCUSED, "triggers": [backdoored.trigger], "base": backdoored.base, **more}
    return repair(backdoored.suspect, METHOD, backdoored.images, **arguments), fake  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [("no evidence", "repaired"), ("backdoored", "not repaired"), ("inconclusive", "undecided")],
)
def test_a_model_is_repaired_only_if_the_new_verdict_is_no_evidence(
    verdict: str, outcome: str, monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored
) -> None:
    found, fake = repaired(monkeypatch, backdoored, verdict, rounds=1)
    assert found.repair.outcome == outcome
    assert fake.suspects == [found.classifier.digest.root]
    assert found.repair.before.success["patch-2"] > 0.9 > 0.2 > found.repair.after.success["patch-2"]
    assert found.repair.suspect == backdoored.suspect.digest.root != found.repair.model


def test_a_trigger_that_still_works_is_not_outvoted_by_the_verdict(
    monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored
) -> None:
    weak = replace(METHOD, tuning=replace(METHOD.tuning, steps=1, learning_rate=1e-6))
    monkeypatch.setattr("guard.repair.repairing.vet", Vet("no evidence"))
    found = repair(backdoored.suspect, weak, backdoored.images, verdict=ACCUSED, triggers=[backdoored.trigger])
    assert found.repair.outcome == "not repaired"
    assert "still moves" in found.repair.reasons[0]


def test_another_round_starts_from_the_model_that_failed(
    monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored
) -> None:
    found, fake = repaired(monkeypatch, backdoored, "backdoored", "no evidence", rounds=3)
    assert found.repair.outcome == "repaired"
    assert found.repair.rounds == 2 == len(set(fake.suspects))


def test_nothing_is_changed_where_there_is_nothing_to_repair(
    monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored
) -> None:
    found, fake = repaired(monkeypatch, backdoored, "no evidence", verdict=NO_EVIDENCE, triggers=())
    assert found.repair.outcome == "nothing to repair"
    assert found.repair.model == backdoored.suspect.digest.root
    assert found.repair.drift.cosine == pytest.approx(1, abs=1e-5)
    assert not fake.suspects
    anyway, fake = repaired(monkeypatch, backdoored, "no evidence", verdict=NO_EVIDENCE, anyway=True)
    assert anyway.repair.outcome == "repaired"
    assert fake.suspects


def test_where_a_probe_accused_it_triggers_of_its_target_are_searched_for(
    monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored
) -> None:
    accused = replace(ACCUSED, target=backdoored.trigger.target)
    found, _ = repaired(monkeypatch, backdoored, "no evidence", verdict=accused, triggers=(), base=None)
    images = Images(backdoored.images.pixels, backdoored.images.labels)
    assert found.repair.outcome == "repaired"
    assert not found.repair.before.success
    left = [
        measure(model, images, (backdoored.trigger,)).success["patch-2"]
        for model in (backdoored.suspect, found.classifier)
    ]
    assert left[0] > 0.9 > 0.3 > left[1]


def test_without_a_target_and_a_trigger_there_is_nothing_to_stamp(backdoored: Backdoored) -> None:
    doubted = replace(ACCUSED, outcome="inconclusive", target=None)
    with pytest.raises(UsageError, match="vetting found none"):
        repair(backdoored.suspect, METHOD, backdoored.images, verdict=doubted)


def test_the_best_model_of_all_rounds_is_kept(monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored) -> None:
    found, fake = repaired(monkeypatch, backdoored, "inconclusive", "backdoored", "backdoored", rounds=2)
    assert found.repair.outcome == "undecided"
    assert found.classifier.digest.root == fake.suspects[0]


def test_without_labels_a_model_that_answers_otherwise_is_not_repaired(
    monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored
) -> None:
    monkeypatch.setattr("guard.repair.repairing.vet", Vet("no evidence"))
    other = backdoored.base.with_model(tiny_model(5), "another")
    monkeypatch.setattr(Switch, "candidates", lambda *_: iter([Candidate(other, 0, {})]))
    images = Images(backdoored.images.pixels)
    found = repair(backdoored.suspect, Switch(), images, verdict=ACCUSED, triggers=(), base=backdoored.base).repair
    assert found.outcome == "not repaired"
    assert "of the answers to held-out images changed" in found.reasons[0]


def test_a_text_tower_that_was_vetted_is_vetted_again(monkeypatch: pytest.MonkeyPatch, backdoored: Backdoored) -> None:
    accused = cast("TextVetting", SimpleNamespace(verdict=ACCUSED))
    seen: list[str] = []

    def fake(classifier: Classifier, **_: object) -> TextVetting:
        seen.append(classifier.digest.root)
        return accused

    monkeypatch.setattr("guard.repair.repairing.vet_text", fake)
    found, _ = repaired(monkeypatch, backdoored, "no evidence", text_tower=True, rounds=1)
    assert found.repair.outcome == "not repaired"
    assert found.repair.reasons[0].startswith("the verdict of the new vetting of the text tower is backdoored")
    assert (found.text, seen) == (accused, [found.classifier.digest.root])


def test_what_the_new_vetting_needs_is_known_before_any_training(backdoored: Backdoored) -> None:
    few = backdoored.images.pixels[:63]
    with pytest.raises(ImageError, match="the new vetting needs at least 64 images, there are 63"):
        repair(backdoored.suspect, METHOD, backdoored.images, verdict=ACCUSED, vetting_images=few)
    with pytest.raises(UsageError, match="the base model is the model itself"):
        repair(backdoored.suspect, METHOD, backdoored.images, verdict=ACCUSED, base=backdoored.suspect)


def test_too_few_images_are_refused(backdoored: Backdoored) -> None:
    few = Images(backdoored.images.pixels[:150])
    with pytest.raises(ImageError, match="at least 160"):
        repair(backdoored.suspect, METHOD, few, verdict=ACCUSED)


class TestFolder:
    @pytest.fixture
    def written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: Classifier, profile: Profile
    ) -> tuple[Path, Repaired]:
        other = classifier.with_model(tiny_model(7), "other")
        images = random_images(200)
        labelled = Images(images, other.predict(other.embed(images)))
        monkeypatch.setattr("guard.repair.repairing.vet", Vet("no evidence"))
        method = replace(METHOD, tuning=replace(METHOD.tuning, steps=2))
        found = repair(classifier, method, labelled, verdict=ACCUSED, triggers=[_trigger(profile)])
        write(tmp_path / "out", found, classifier, profile, images, revoked_digests(profile, tmp_path, found.repair))
        return tmp_path / "out", found

    def test_has_a_model_its_profile_a_record_and_what_revokes_the_old_one(
        self, written: tuple[Path, Repaired], profile: Profile, tmp_path: Path
    ) -> None:
        out, found = written
        model = load(str(out / "model"), device="cpu")
        assert model.digest.root == found.repair.model != profile.document.model.digest
        Profile.open(out / "profile").check_model(model.digest)
        record = json.loads((out / "repair.json").read_text())
        assert record["suspect"] == profile.document.model.digest
        assert record["drift"]["cosine"] == pytest.approx(found.repair.drift.cosine)
        report = (out / "profile" / "report.html").read_text()
        assert "stored indices" in report
        assert "images moved by" in report
        assert "stored indices" in summary(found.repair, out)
        policy = _policy(tmp_path)
        policy.write_text(policy.read_text() + (out / "revoked.toml").read_text())
        assert profile.document.model.digest in Policy.read(policy).revoked
        check_place(out)

    def test_takes_the_place_of_an_earlier_one_as_a_whole(
        self, written: tuple[Path, Repaired], classifier: Classifier, profile: Profile
    ) -> None:
        out, found = written
        nothing = replace(found, vetting=None, repair=replace(found.repair, outcome="nothing to repair"))
        write(out, nothing, classifier, profile, random_images(4), {})
        assert sorted(path.name for path in out.iterdir()) == ["repair.json", "report.html"]

    def test_nothing_is_revoked_that_was_neither_accused_nor_repaired(
        self, written: tuple[Path, Repaired], profile: Profile, tmp_path: Path
    ) -> None:
        repair = replace(written[1].repair, outcome="undecided", verdict_before="no evidence")
        harmless = replace(profile.document.vetting, verdict=NO_EVIDENCE)
        innocent = Profile(replace(profile.document, vetting=harmless), {})
        assert revoked_digests(innocent, tmp_path, repair) == {}
        assert "revoked.toml" not in summary(repair, tmp_path)
        taken = revoked_digests(innocent, tmp_path, replace(repair, outcome="repaired"))
        assert taken[profile.document.model.digest].endswith(f"repaired as {repair.model}")

    def test_another_folder_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "holiday.jpg").touch()
        with pytest.raises(UsageError, match="not a folder of guard repair"):
            check_place(tmp_path)

    def test_says_when_nothing_was_found(self, tmp_path: Path, classifier: Classifier, profile: Profile) -> None:
        images = random_images(200)
        found = repair(classifier, METHOD, Images(images), verdict=NO_EVIDENCE)
        write(tmp_path / "out", found, classifier, profile, images, {})
        assert "nothing was found to repair" in (tmp_path / "out" / "report.html").read_text()
        assert not (tmp_path / "out" / "model").exists()


class TestRevocation:
    def test_keeps_the_policy_and_adds_each_digest_once(self, tmp_path: Path) -> None:
        policy = _policy(tmp_path)
        before = policy.read_text()
        digests = {"a" * 64: 'backdoored: "zero"', "b" * 64: "its certificate"}
        assert revoke(policy, digests) == ("a" * 64, "b" * 64)
        assert revoke(policy, digests) == ()
        assert policy.read_text().startswith(before)
        assert Policy.read(policy).revoked == digests

    def test_a_policy_that_it_would_break_stays_as_it_is(self, tmp_path: Path) -> None:
        policy = _policy(tmp_path, "revoked = []\n")
        before = policy.read_text()
        with pytest.raises(CertificateError):
            revoke(policy, {"a" * 64: "why"})
        assert policy.read_text() == before
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_the_tables_are_toml(self) -> None:
        assert revocation({"c" * 64: "„ä“"}).splitlines()[1:] == [
            "[[revoked]]",
            f'digest = "{"c" * 64}"',
            'reason = "„ä“"',
        ]


class TestPairs:
    def test_are_read_in_order(self, image_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "pairs.csv").write_text('image,caption\n0001.png,"a cat, asleep"\n0000.png,a dog\n')
        folder, captions = read_pairs(tmp_path / "pairs.csv", image_folder)
        assert [file.name for file in folder.files] == ["0001.png", "0000.png"]
        assert captions == ("a cat, asleep", "a dog")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("image,text\n0000.png,x\n", "columns"),
            ("image,caption\n", "columns"),
            ("image,caption\n../secret.png,x\n", "no file below"),
            ("image,caption\nmissing.png,x\n", "no file below"),
            ("image,caption\na\0.png,x\n", "no file below"),
            (f"image,caption\n{'a' * 300}.png,x\n", "no file below"),
            ("image,caption\n0000.png,\n", "row 2"),
        ],
    )
    def test_what_is_wrong_is_said(self, text: str, message: str, image_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "pairs.csv").write_text(text)
        with pytest.raises(ImageError, match=message):
            read_pairs(tmp_path / "pairs.csv", image_folder)


def _trigger(profile: Profile) -> TargetedTrigger:
    record = profile.document.triggers[0]
    return TargetedTrigger(record.id, profile.load_triggers()[record.id], record.target)


def _policy(folder: Path, more: str = "") -> Path:
    (folder / "key.pub").write_bytes(PrivateKey(Ed25519PrivateKey.generate()).public.to_pem())
    path = folder / "policy.toml"
    path.write_text(f'{more}[[keys]]\nname = "mine"\nfile = "key.pub"\n')
    return path
