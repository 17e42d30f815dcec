"""The Python API: its names, its cost, and docs/api.md, executed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import guard
from guard.classifiers import save
from tests.conftest import CLASSES, CONFIG, random_images, tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
TYPED = Path(__file__).parents[1] / "typing" / "api.py"


def write_images(folder: Path, count: int, *, seed: int) -> None:
    folder.mkdir()
    for index, pixels in enumerate(random_images(count, seed=seed)):
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(folder / f"{index:04}.png")


def test_every_name_is_there_and_no_other_is_promised() -> None:
    for name in guard.__all__:
        assert getattr(guard, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        guard.nonsense  # noqa: B018 - the access is the test


def test_importing_guard_loads_next_to_nothing() -> None:
    code = "import sys; before = set(sys.modules); import guard; print(len(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 80


def test_the_tutorial_names_what_exists() -> None:
    for name in re.findall(r"\bguard\.(\w+)", guard.__doc__ or ""):
        assert name in guard.__all__ or (Path(guard.__path__[0]) / name).is_dir(), name


def test_the_typed_consumer_uses_every_public_name() -> None:
    text = TYPED.read_text(encoding="utf-8")
    assert [name for name in guard.__all__ if f"guard.{name}" not in text] == []


def test_the_page_runs_from_top_to_bottom(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_directory, "my-model")
    save(Path("base-model"), tiny_model(seed=1), CONFIG, CLASSES)
    write_images(Path("images"), 64, seed=1)
    write_images(Path("clean-images"), 300, seed=2)
    write_images(Path("requests"), 4, seed=3)
    served: list[guard.Settings] = []
    monkeypatch.setattr(guard, "serve", served.append)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(DOCS), "exec"), namespace)  # noqa: S102 - our own page
    assert namespace["verdict"].outcome in {"backdoored", "no evidence", "inconclusive"}
    assert Path("my-profile/report.html").is_file()
    assert namespace["result"].flags.shape == (4,)
    assert [settings.model for settings in served] == [Path("my-export")]
    assert "there is no model no-such-model" in capsys.readouterr().out
