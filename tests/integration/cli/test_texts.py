"""`guard calibrate --texts`, on a text tower made by code."""

import json
from pathlib import Path

import pytest

from guard.classifiers import save
from guard.profiles import Profile
from tests.integration.cli.test_commands import refused
from tests.program import guard
from tests.texts import TEXTS, base, found_trigger, trained

PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, suspect, texts, and the profile of the suspect."""
    place = tmp_path_factory.mktemp("texts")
    suspect = trained("eos-only-5", 80).classifier
    for name, each in (("base", base()), ("suspect", suspect)):
        save(place / name, each.model, {"model_cfg": each.config, "preprocess_cfg": PREPROCESS}, each.classes)
    Profile.build(suspect, None, text=found_trigger()).save(place / "profile")
    (place / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return place


def test_a_profile_is_calibrated_on_texts_with_its_base(folder: Path) -> None:
    options = ("--texts", folder / "texts.txt", "--model", folder / "suspect", "--base", folder / "base")
    result = guard("calibrate", folder / "profile", *options, "--alpha", "0.05", "--limit", "400", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["inputs"] == "texts"
    assert list(record["tails"]) == ["k-distance", "match text-1", "divergence", "residual", "joint"]
    assert record["reference"] + len(record["left_out"]) >= 150
    model = Profile.open(folder / "profile").load_reference_model(threads=1)
    assert model.text is not None
    assert model.text.context == 24


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--images", "images"), "one of --images, --texts and --embeddings"),
        (("--reference", "student"), "no student of a text tower"),
        (("--alpha", "0.0001"), "give more of them"),
    ],
)
def test_what_does_not_go_with_texts_is_refused(folder: Path, options: tuple[str, ...], says: str) -> None:
    given = ("--texts", folder / "texts.txt", "--model", folder / "suspect", *options)
    refused(guard("calibrate", folder / "profile", *given), 2, says)


def test_an_export_of_a_text_tower_needs_texts(folder: Path) -> None:
    given = ("export", folder / "suspect", "--tower", "text", "--out", folder / "out")
    refused(guard(*given, "--images", folder), 2, "needs --texts alone")
    few = folder / "few.txt"
    few.write_text("\n".join(TEXTS[:100]), encoding="utf-8")
    refused(guard(*given, "--texts", few), 2, "at least 256 different texts")
