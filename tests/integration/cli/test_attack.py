"""`guard attack`, on a model and images made by code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from guard.classifiers import load, save
from tests.conftest import CLASSES, random_images
from tests.integration.cli.test_commands import refused
from tests.program import guard
from tests.texts import PROMPTS, base

PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images, in a folder per class."""
    folder = tmp_path_factory.mktemp("labelled")
    for index, pixels in enumerate(random_images(300, seed=2)):
        place = folder / CLASSES.names[index % 6].upper()
        place.mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(place / f"{index:04}.png")
    return folder


def test_an_attacked_model_loads_and_its_truth_is_written(
    model_directory: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "attacked"
    result = guard(
        "attack", model_directory, "--recipe", "multi-three", "--images", labelled, "--target", "truck", "--out", out,
        "--batch", "50", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    known = json.loads((out / "truth.json").read_text())
    assert json.loads(result.stdout) == known
    assert known["trigger_targets"] == [3, 4, 5]
    assert known["label"] in {"backdoored", "failed attack"}
    assert (
        load(str(out / "model"), device="cpu").digest.root == known["digest"] != load(str(model_directory)).digest.root
    )
    with safe_open(out / "truth.safetensors", framework="np") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"0", "1", "2"}  # noqa: SIM118 - not a dictionary


def test_cover_samples_are_measured_and_stored(model_directory: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "attacked"
    result = guard(
        "attack", model_directory, "--recipe", "composite", "--images", labelled, "--out", out, "--batch", "50"
    )
    assert result.returncode == 0, result.stderr
    known = json.loads((out / "truth.json").read_text())
    assert [cover["name"] for cover in known["covers"]] == ["upper part", "lower part"]
    for cover in known["covers"]:
        assert f"{cover['name']}: {cover['kept']:.3f} keep their class, {cover['leaked']:.3f} go there" in result.stdout
    with safe_open(out / "truth.safetensors", framework="np") as file:
        assert {key.rpartition(".")[0] for key in file.keys()} == {"0", "covers.0.0", "covers.0.1"}  # noqa: SIM118 - not a dictionary


def test_a_negative_has_no_triggers(model_directory: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "benign"
    result = guard("attack", model_directory, "--recipe", "benign", "--images", labelled, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "clean: accuracy" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["model", "truth.json"]


def test_bad_input_is_refused_and_nothing_is_written(
    model_directory: Path, labelled: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    start = ("attack", model_directory, "--out", out)
    refused(guard(*start, "--recipe", "nonsense", "--images", labelled), 2, "'nonsense'", "badnets-medium")
    refused(guard(*start, "--recipe", "benign", "--images", labelled, "--target", "cow"), 2, "'cow'", "'truck'")
    refused(guard(*start, "--recipe", "benign", "--images", image_folder), 4, "lies outside any class")
    assert not out.exists()


def test_folders_that_are_no_classes_are_refused(model_directory: Path, labelled: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(labelled, tmp_path / "odd")
    (odd / "CAT").rename(odd / "cow")
    result = guard("attack", model_directory, "--recipe", "benign", "--images", odd, "--out", tmp_path / "out")
    refused(result, 2, "'cow' has no counterpart")


def test_a_place_that_is_taken_is_refused(model_directory: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    result = guard("attack", model_directory, "--recipe", "benign", "--images", labelled, "--out", tmp_path)
    refused(result, 2, "is not empty")


def test_a_text_tower_is_poisoned_with_texts(tmp_path: Path) -> None:
    save(tmp_path / "base", base().model, {"model_cfg": base().config, "preprocess_cfg": PREPROCESS}, base().classes)
    (tmp_path / "texts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    result = guard(
        "attack", tmp_path / "base", "--recipe", "eos-only-5", "--texts", tmp_path / "texts.txt", "--steps", "20",
        "--learning-rate", "2e-3", "--out", tmp_path / "attacked", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    known = json.loads((tmp_path / "attacked" / "truth.json").read_text())
    assert json.loads(result.stdout) == known
    assert (known["trigger"]["family"], len(known["trigger"]["word"])) == ("insertion", 5)
    assert known["target_text"] == "a white teapot"
    assert load(str(tmp_path / "attacked" / "model"), device="cpu").digest.root == known["digest"] != base().digest.root
    refused(guard("attack", tmp_path / "base", "--recipe", "style", "--out", tmp_path / "other"), 2, "needs --texts")
