"""`guard scan`, on embeddings and on a folder of images."""

import json
from pathlib import Path

import numpy as np

from tests.program import guard


def test_a_folder_is_scanned_and_the_keep_list_names_its_images(
    model_directory: Path, image_folder: Path, tmp_path: Path
) -> None:
    result = guard(
        "scan", image_folder, "--model", model_directory, "--out", tmp_path / "out", "--k", "4", "--sample", "32",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["pairs"], found["skipped"]) == (300, [])
    assert found == json.loads((tmp_path / "out" / "summary.json").read_text())
    kept = (tmp_path / "out" / "keep.txt").read_text().splitlines()
    assert len(kept) == 300 - found["removed"]
    assert kept[0] == "images 00000\t0000.png"
    assert "seconds" not in result.stdout or "cost:" in result.stderr


def test_embeddings_are_scanned_without_a_model(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32))
    result = guard("scan", tmp_path / "e.npy", "--out", tmp_path / "out", "--method", "dao", "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert "poisoned pairs: about 0 (0 to 0) of 300" in result.stdout
    assert "which does not mean that the set is clean" in result.stdout


def test_wrong_usage_is_explained(tmp_path: Path) -> None:
    result = guard("scan", tmp_path / "none.tar", "--out", tmp_path / "out")
    assert result.returncode == 4
    assert "give --model to embed a training set" in result.stderr
    result = guard("scan", tmp_path / "none.npy", "--out", tmp_path / "out", "--as-released")
    assert result.returncode == 2
    assert "--reference batch" in result.stderr
