"""`guard convert`, and commands with `--prompt-learner`."""

import json
from pathlib import Path

import torch

from guard.classifiers.prompts import load_prompt_learner
from guard.profiles import Profile
from tests.integration.cli.test_commands import refused
from tests.program import guard


def test_a_checkpoint_is_converted_and_its_classifier_vetted_against_its_own_towers(
    model_directory: Path, image_folder: Path, tmp_path: Path
) -> None:
    checkpoint, file, out = tmp_path / "model.pth.tar-50", tmp_path / "learner.safetensors", tmp_path / "profile"
    torch.save({"state_dict": {"ctx": 0.1 * torch.ones(4, 16)}, "epoch": 50}, checkpoint)
    result = guard("convert", checkpoint, "--out", file, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"kind": "coop", "tensors": {"ctx": [4, 16]}}
    assert load_prompt_learner(file).kind == "coop"
    result = guard(
        "vet", model_directory, "--prompt-learner", file, "--images", image_folder, "--limit", "64",
        "--budget", "quick", "--out", out,
    )  # fmt: skip
    assert result.returncode in {0, 1, 3}, result.stderr
    assert Profile.open(out).document.vetting.reference_model.kind == "base"


def test_what_is_no_prompt_learner_is_refused(model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "learner.pt"
    torch.save({"ctx": torch.ones(4, 16)}, pickled)
    common = ("vet", model_directory, "--images", image_folder, "--out", tmp_path / "profile")
    refused(guard(*common, "--prompt-learner", pickled), 4, "is a pickle")
    refused(guard("convert", image_folder / "0000.png", "--out", tmp_path / "x.safetensors"), 4, "torch's zip format")
    assert not (tmp_path / "x.safetensors").exists()
