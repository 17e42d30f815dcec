"""The commands as a user runs them, good input and bad."""

import json
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from guard.vetting import BUDGETS, DerivedReferenceSettings, Effort, InspectionSettings, SearchSettings
from tests.conftest import CLASSES, CONFIG, tiny_model
from tests.program import guard


def refused(result: "CompletedProcess[str]", code: int, *parts: str) -> None:
    """One clear line, the exit code that is documented, and nothing on standard output."""
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    for part in parts:
        assert part in message


@pytest.fixture
def base(tmp_path: Path) -> Path:
    from guard.classifiers import save

    save(tmp_path / "base", tiny_model(1), CONFIG, CLASSES)
    return tmp_path / "base"


def test_vet_calibrate_export_and_what_they_print(
    model_directory: Path, base: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Effort(InspectionSettings(3, batch=16), SearchSettings(3, batch=16), DerivedReferenceSettings(steps=1))
    monkeypatch.setitem(BUDGETS, "quick", fast)
    out = tmp_path / "profile"
    vetted = guard(
        "vet", model_directory, "--images", image_folder, "--base", base, "--out", out, "--budget", "quick", "--json"
    )  # fmt: skip
    document = json.loads(vetted.stdout)
    verdict = document["vetting"]["verdict"]["outcome"]
    assert vetted.returncode == {"no evidence": 0, "backdoored": 1, "inconclusive": 3}[verdict]
    assert document["vetting"]["effort"]["inspection"]["steps"] == 3
    assert document["vetting"]["reference_model"]["kind"] == "base"
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "report.html", "triggers.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "profile"]  # no searches left behind

    calibrated = guard("calibrate", out, "--images", image_folder, "--alpha", "0.05", "--reference", "none")
    assert calibrated.returncode == 0, calibrated.stderr
    assert "second opinion: none" in calibrated.stdout
    assert "for alpha = 0.05, from 120 clean scores" in calibrated.stdout
    assert (out / "reference.safetensors").exists()

    exported = guard("export", model_directory, "--images", image_folder, "--out", tmp_path / "exported", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["agreement"] == 1.0

    np.save(tmp_path / "traffic.npy", np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32))
    again = guard("calibrate", out, "--embeddings", tmp_path / "traffic.npy", "--alpha", "0.1", "--per-class")
    assert again.returncode == 0, again.stderr
    assert "for alpha = 0.1, from 133 clean scores" in again.stdout
    refused(guard("calibrate", out), 2, "one of --images, --texts and --embeddings")
    refused(guard("calibrate", out, "--images", image_folder, "--reference", "base"), 2, "--base MODEL belong together")
    compared = guard("calibrate", out, "--images", image_folder, "--alpha", "0.05", "--base", base)
    assert compared.returncode == 0, compared.stderr
    assert "which gives the same answer to" in compared.stdout
    assert (out / "reference-model" / "model.onnx").exists()
    unknown = guard("calibrate", out, "--embeddings", tmp_path / "traffic.npy", "--alpha", "0.1")
    refused(unknown, 4, "about which embeddings say nothing")

    too_strict = guard("calibrate", out, "--images", image_folder, "--alpha", "0.001")
    refused(too_strict, 2, "needs at least 999 clean images or texts that set the threshold, there are 120")
    assert "from 120 clean scores" in calibrated.stdout


class TestBadInput:
    """Each is one clear line with the documented exit code, and leaves nothing behind."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path: Path) -> None:
        self.out = tmp_path / "out"

    def vet(self, model: object, images: object, *more: object) -> "CompletedProcess[str]":
        result = guard("vet", model, "--images", images, "--out", self.out, *more)
        assert not self.out.exists()
        assert not list(self.out.parent.glob(".out*"))
        return result

    def test_missing_model(self, image_folder: Path, tmp_path: Path) -> None:
        refused(self.vet(tmp_path / "nowhere", image_folder), 4, "there is no model")

    def test_pickle(self, image_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "weights.pt").write_bytes(pickle.dumps({}))
        refused(self.vet(tmp_path / "weights.pt", image_folder), 4, "is a pickle", "safetensors.torch.save_file")

    def test_truncated_safetensors(self, model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
        model = Path(shutil.copytree(model_directory, tmp_path / "model"))
        weights = model / "open_clip_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(self.vet(model, image_folder), 4, "is truncated")

    def test_empty_image_folder(self, model_directory: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        refused(self.vet(model_directory, tmp_path / "empty"), 4, "contains no image")

    def test_unreadable_image_among_good_ones(self, model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
        images = Path(shutil.copytree(image_folder, tmp_path / "images"))
        (images / "0100.png").write_bytes(b"\x89PNG, but not really")
        refused(self.vet(model_directory, images), 4, "0100.png", "not a readable")

    def test_too_few_images(self, model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
        few = tmp_path / "few"
        few.mkdir()
        shutil.copy(image_folder / "0000.png", few)
        refused(self.vet(model_directory, few), 4, "at least 64 images")

    def test_vocabulary(self, model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
        missing = self.vet(model_directory, image_folder, "--vocabulary", tmp_path / "words.txt")
        refused(missing, 4, "there is no vocabulary")
        (tmp_path / "words.txt").write_bytes(b"\xff\xfe\x00")
        refused(
            self.vet(model_directory, image_folder, "--vocabulary", tmp_path / "words.txt"), 4, "is not valid UTF-8"
        )

    def test_one_class_listed_again_and_again(self, model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "names.txt").write_text("cat\ncat\ncat\n")
        result = self.vet(model_directory, image_folder, "--classes", tmp_path / "names.txt")
        refused(result, 4, "all classes are called 'cat'")

    def test_output_that_is_something_else(self, model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "thesis.txt").write_text("years of work")
        result = guard("vet", model_directory, "--images", image_folder, "--out", precious, "--budget", "quick")
        refused(result, 2, "is not replaced")
        assert (precious / "thesis.txt").read_text() == "years of work"

    def test_profile_of_another_model(self, profile_directory: Path, base: Path, image_folder: Path) -> None:
        before = {path.name: path.read_bytes() for path in profile_directory.iterdir()}
        result = guard("calibrate", profile_directory, "--images", image_folder, "--model", base)
        refused(result, 4, "of another model", "weights differ")
        assert {path.name: path.read_bytes() for path in profile_directory.iterdir()} == before

    def test_missing_profile(self, tmp_path: Path, image_folder: Path) -> None:
        refused(guard("calibrate", tmp_path / "x", "--images", image_folder), 4, "there is no profile")

    def test_serving_without_a_profile(self, exported: Path) -> None:
        refused(guard("serve", "--model", exported), 2, "profile")

    def test_port_in_use(self, exported: Path, profile_directory: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            arguments = ["serve", "--model", exported, "--profile", profile_directory]
            refused(guard(*arguments, "--listen", address, "--metrics", "127.0.0.1:0"), 2, address)
            refused(guard(*arguments, "--listen", "127.0.0.1:0", "--metrics", address), 2, address)

    @pytest.mark.parametrize("module", ["torch", "jinja2"])
    def test_serving_part_only(self, module: str, image_folder: Path) -> None:
        code = f"import sys; sys.modules[{module!r}] = None; from guard.cli import main; main()"
        command = [sys.executable, "-c", code, "vet", "model", "--images", str(image_folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        refused(result, 2, f"needs {module}", "pip install 'clip-guard[vet]'")

    def test_wrong_usage(self) -> None:
        refused(guard("vet"), 2, "Missing argument 'MODEL'")
        refused(guard("nonsense"), 2, "No such command")
        refused(guard("serve", "--profile", "p", "--upstream", "nonsense", "--model", "m"), 2, "HOST:PORT")
