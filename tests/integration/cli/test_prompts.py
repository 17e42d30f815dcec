"""`guard convert`, and commands with `--prompt-learner`."""

import json
import shutil
from pathlib import Path

import torch

from guard.classifiers import load
from guard.classifiers.files import LEARNER_FILE
from guard.classifiers.prompts import load_prompt_learner, save_prompt_learner
from guard.profiles import Profile
from tests.integration.cli.test_commands import refused
from tests.program import guard
from tests.unit.certificates.conftest import keys
from tests.unit.classifiers.test_prompts import DEPTH, WIDTH, learner

__all__ = ["keys"]


def test_a_checkpoint_is_converted_and_its_classifier_vetted_against_prompts_tuned_anew(
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
    assert Profile.open(out).document.vetting.reference_model.kind == "derived"


def test_a_learner_in_the_folder_of_its_model_is_vetted_calibrated_certified_and_exported_with_it(
    model_directory: Path, image_folder: Path, keys: Path, tmp_path: Path
) -> None:
    model, profile, served = tmp_path / "model", tmp_path / "profile", tmp_path / "exported"
    shutil.copytree(model_directory, model)
    save_prompt_learner(model / LEARNER_FILE, learner("cocoop"))
    budget = ("--limit", "64", "--budget", "quick")
    result = guard("vet", model, "--images", image_folder, *budget, "--out", profile)
    assert result.returncode in {0, 1, 3}, result.stderr
    found = Profile.open(profile).document
    assert (found.vetting.reference_model.kind, found.model.embedding) == ("derived", WIDTH + DEPTH + 6 + 1)
    result = guard("calibrate", profile, "--images", image_folder, "--alpha", "0.05")
    assert result.returncode == 0, result.stderr
    opened = Profile.open(profile)
    opinion = opened.document.calibration.second_opinion if opened.document.calibration else None
    assert opinion is not None
    assert (opinion.kind, opinion.embedding, opinion.digest) == ("base", DEPTH, load(str(model_directory)).digest.root)
    assert not opened.load_reference_model().has_tokens
    result = guard("export", model, "--images", image_folder, "--out", served)
    assert result.returncode == 0, result.stderr
    result = guard("certify", profile, "--model", model, "--exported", served, "--key", keys / "ed.pem")
    assert result.returncode == 0, result.stderr
    asked = ("--profile", profile, "--trust", keys / "ed.pub")
    for folder in (model, served):
        assert "rule subject" not in guard("verify", folder, *asked).stdout
    save_prompt_learner(model / LEARNER_FILE, learner("cocoop", seed=1))
    result = guard("verify", model, *asked)
    assert result.returncode == 1
    assert f"model/{LEARNER_FILE} is not the file" in result.stdout


def test_a_folder_with_a_learner_takes_no_other(model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    save_prompt_learner(model / LEARNER_FILE, learner("coop"))
    common = ("vet", model, "--images", image_folder, "--out", tmp_path / "profile")
    refused(guard(*common, "--prompt-learner", model / LEARNER_FILE), 4, "holds a prompt learner already")


def test_what_is_no_prompt_learner_is_refused(model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "learner.pt"
    torch.save({"ctx": torch.ones(4, 16)}, pickled)
    common = ("vet", model_directory, "--images", image_folder, "--out", tmp_path / "profile")
    refused(guard(*common, "--prompt-learner", pickled), 4, "is a pickle")
    refused(guard("convert", image_folder / "0000.png", "--out", tmp_path / "x.safetensors"), 4, "torch's zip format")
    assert not (tmp_path / "x.safetensors").exists()
