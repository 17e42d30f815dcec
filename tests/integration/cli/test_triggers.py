"""`guard triggers` as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guard.triggers import KNOWN
from tests.program import guard


@pytest.fixture
def few(image_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}.png").write_bytes((image_folder / f"{index:04}.png").read_bytes())
    return folder


def test_it_lists_every_trigger_and_draws_a_sheet(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sheet.png"
    result = guard("triggers", "--images", few, "--out", out, "--size", 32, "--json")
    assert result.returncode == 0, result.stderr
    listed = json.loads(result.stdout)
    assert [item["name"] for item in listed] == list(KNOWN)
    assert all(item["family"] and item["source"] for item in listed)
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # One row per trigger and one without: the last column, the change, is mid-grey wherever nothing changed.
    rows = pixels.shape[0] // (len(KNOWN) + 1)
    assert rows > 96
    assert (pixels[:, -60] == 128).all(-1).any()


def test_equal_seeds_draw_equal_sheets(few: Path, tmp_path: Path) -> None:
    sheets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / f"{name}.png"
        assert guard("triggers", "--images", few, "--out", out, "--size", 16, "--seed", seed).returncode == 0
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_bad_input_is_one_clear_line(few: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, code, message in (
        (("--images", few, "--out", tmp_path / "thesis.txt"), 2, "must end in .png"),
        (("--images", few, "--out", tmp_path / "file" / "sheet.png", "--size", 16), 2, "cannot write"),
        (("--images", tmp_path / "empty", "--out", tmp_path / "sheet.png"), 4, "contains no image"),
        (("--images", few, "--size", 8), 2, "8 is not in the range"),
    ):
        result = guard("triggers", *arguments)
        assert result.returncode == code, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not result.stdout
    assert not list(tmp_path.glob("*.png"))
