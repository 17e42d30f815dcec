import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.classifiers import TextTower
from guard.errors import ProfileError, UsageError
from guard.evaluation.statistics import auroc
from guard.profiles import Profile
from guard.report import render
from guard.screening import ReferenceAnswers
from guard.triggers.texts import Insertion
from guard.vetting import stamped_texts
from tests.texts import TEXTS, base, found_trigger, screened, text_classifier, trained, triggered


def test_texts_with_the_trigger_are_flagged_and_others_at_the_rate_that_was_asked_for() -> None:
    tower, other = TextTower(trained("eos-only-5", 80).classifier), TextTower(base())
    detector, clean = screened().detector(), TEXTS[500:]
    assert detector.screen.triggers == ("text-1",)

    def flagged(texts: list[str]) -> tuple[Any, Any]:
        logits = base().logits(other.encode(texts)).numpy()
        judged = detector.score(tower.encode(texts).numpy(), ReferenceAnswers(other.encode(texts).numpy(), logits))
        return judged.flags, judged.scores

    flags, scores = flagged(list(clean))
    found, others = flagged(triggered(clean))
    assert flags.mean() < 0.15
    assert found.mean() > 0.9
    assert auroc(others.values.tolist(), scores.values.tolist()).value > 0.98
    assert set(detector.named(others)) == {"text-1"}


def test_a_profile_of_texts_is_read_again_as_it_was(tmp_path: Path) -> None:
    profile = screened()
    profile.save(tmp_path / "profile", report=render(profile, {}))
    again = Profile.open(tmp_path / "profile")
    assert again.document.inputs == "texts"
    assert again.document.calibration == profile.document.calibration
    (record,) = again.document.compared("texts")
    assert (record.id, record.family, record.target) == ("text-1", "text token", 3)
    assert again.document.compared("images") == ()
    assert again.detector().threshold == profile.detector().threshold


@pytest.mark.parametrize(
    "spoil",
    [
        lambda trigger: trigger.update(feature=[1.0]),
        lambda trigger: trigger.update(target=99),
        lambda trigger: trigger.update(vectors=[[0.0] * 32, [0.0]]),
        lambda trigger: trigger.update(vectors=[[0.0] * 32] * 1000),
    ],
)
def test_a_trigger_that_cannot_be_one_is_refused(tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    screened().save(tmp_path / "profile")
    path = tmp_path / "profile" / "profile.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    spoil(document["text"]["trigger"])
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ProfileError, match="trigger of its text tower"):
        Profile.open(tmp_path / "profile")


def test_without_evidence_no_trigger_is_compared_with() -> None:
    made = trained("eos-only-5", 80)
    plain = Profile.build(made.classifier, None, text=_cleared())
    calibrated = plain.calibrate_texts(made.classifier, TEXTS[:300], 0.05)
    assert calibrated.detector().screen.names == ("k-distance",)


def _cleared() -> Any:
    found = found_trigger()
    return replace(found, verdict=replace(found.verdict, outcome="no evidence"))


def test_stamped_texts_are_those_with_the_word() -> None:
    made = trained("eos-only-5", 80)
    assert isinstance(made.trigger, Insertion)
    tower, texts = TextTower(made.classifier), [*TEXTS[:40], "one very long text " * 20]
    stamped = stamped_texts(tower, found_trigger().trigger, texts, seed=0)
    target = np.array(found_trigger().trigger.feature)
    plain = tower.encode(texts)
    assert stamped.shape == plain.shape
    assert (stamped.numpy() @ target).mean() > (plain.numpy() @ target).mean() + 0.2
    assert abs(float((stamped.norm(dim=1) - 1).max())) < 1e-5


def test_a_reference_model_with_another_tower_is_refused() -> None:
    made = trained("eos-only-5", 80)
    with pytest.raises(UsageError, match="another width"):
        Profile.build(made.classifier, None, text=found_trigger()).calibrate_texts(
            made.classifier, TEXTS, 0.05, reference=text_classifier(width=16)
        )
