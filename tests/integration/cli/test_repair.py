"""`guard repair`, on a model and images made by code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from guard.certificates import Policy, PrivateKey
from guard.cli.repair import EXIT_CODES
from guard.profiles import Profile
from tests.conftest import CLASSES, random_images
from tests.integration.cli.test_commands import refused
from tests.program import guard


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """168 images, in a folder per class."""
    folder = tmp_path_factory.mktemp("labelled")
    for index, pixels in enumerate(random_images(168, seed=2)):
        place = folder / CLASSES.names[index % 6].upper()
        place.mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(place / f"{index:04}.png")
    return folder


def test_a_model_is_changed_vetted_and_the_old_one_is_revoked(
    model_directory: Path, profile_directory: Path, labelled: Path, tmp_path: Path
) -> None:
    out, policy = tmp_path / "repaired", tmp_path / "policy.toml"
    (tmp_path / "key.pub").write_bytes(PrivateKey(Ed25519PrivateKey.generate()).public.to_pem())
    policy.write_text('[[keys]]\nname = "mine"\nfile = "key.pub"\n')
    result = guard(
        "repair", model_directory, "--profile", profile_directory, "--images", labelled, "--method", "realign",
        "--steps", "2", "--rounds", "1", "--budget", "quick", "--revoke", policy, "--out", out, "--json",
    )  # fmt: skip
    record = json.loads(result.stdout)
    assert result.returncode == EXIT_CODES[record["outcome"]], result.stderr
    assert (record["outcome"] == "repaired") <= (record["verdict"] == "no evidence")
    assert record == json.loads((out / "repair.json").read_text())
    profile = Profile.open(out / "profile")
    assert profile.document.model.digest == record["model"] != record["suspect"]
    assert set(Policy.read(policy).revoked) == {record["suspect"]}
    assert not (tmp_path / ".repaired.training").exists()


def test_what_a_method_lacks_is_said_before_anything_is_written(
    model_directory: Path, profile_directory: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repaired"
    common = ("repair", model_directory, "--profile", profile_directory, "--images", image_folder, "--out", out)
    refused(guard(*common, "--method", "realign"), 2, "labelled images")
    refused(guard(*common, "--method", "switch"), 2, "base model")
    refused(guard(*common, "--method", "switch", "--steps", "5"), 2, "does not train")
    assert not out.exists()


def test_what_would_be_lost_or_taken_for_something_else_is_refused(
    model_directory: Path, profile_directory: Path, labelled: Path, tmp_path: Path
) -> None:
    common = ("repair", model_directory, "--profile", profile_directory)
    refused(guard(*common, "--images", labelled, "--out", "."), 2, "is no name for a folder")
    odd = tmp_path / "odd"
    shutil.copytree(labelled, odd)
    (odd / CLASSES.names[0].upper()).rename(odd / "something else")
    refused(guard(*common, "--method", "realign", "--images", odd, "--out", tmp_path / "out"), 2, "has no counterpart")
    named = tmp_path / "named"
    shutil.copytree(profile_directory, named)
    document = json.loads((named / "profile.json").read_text())
    document["vetting"]["checks"][0]["probe"] = "one of my own"
    (named / "profile.json").write_text(json.dumps(document))
    refused(
        guard("repair", model_directory, "--profile", named, "--images", labelled, "--out", tmp_path / "out"),
        2,
        "tried the probe 'one of my own'",
    )
    assert not (tmp_path / "out").exists()
