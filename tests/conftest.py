"""Fixtures made by code: a small classifier with random weights, its export, and a calibrated profile.

torch is imported by the fixtures that need it: tests of the serving part also run where only that is installed.
"""

import fcntl
import os
import signal

# Before torch starts its threads: models of 16 pixels gain nothing from them, and workers would take them from each
# other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

from guard.classifiers import ClassList
from guard.profiles import Profile
from guard.vetting import Check, ClassStatistic, FamilyResult, ReferenceModel, Verdict

if TYPE_CHECKING:
    import torch

    from guard.classifiers import Classifier
    from guard.triggers import Patch

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so would all programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast a machine is must not decide whether a test passes.
settings.register_profile("guard", deadline=None)
settings.load_profile("guard")

SIZE = 16
CLASSES = ClassList(("cat", "dog", "ship", "truck", "frog", "bird"), ("a photo of a {}.", "a {}."))
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CONFIG = {"model_cfg": ARCHITECTURE, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """GUARD_… variables of the machine must not reach a test."""
    for name in [name for name in os.environ if name.startswith("GUARD_")]:
        monkeypatch.delenv(name)


def tiny_model(seed: int = 0) -> "torch.nn.Module":
    """An untrained open_clip model."""
    import open_clip
    import torch

    torch.manual_seed(seed)
    model: torch.nn.Module = open_clip.CLIP(16, ARCHITECTURE["vision_cfg"], ARCHITECTURE["text_cfg"])
    return model


def random_images(count: int, *, seed: int = 0, size: int = SIZE) -> "torch.Tensor":
    """Smooth random images: uint8, shape [count, 3, size, size]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 255).round().to(torch.uint8)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip directory with a class list."""
    from guard.classifiers import save

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save(directory, tiny_model(), CONFIG, CLASSES)
    return directory


@pytest.fixture(scope="session")
def classifier(model_directory: Path) -> "Classifier":
    """That model, loaded."""
    from guard.classifiers import load

    return load(str(model_directory), device="cpu")


@pytest.fixture(scope="session")
def images() -> "torch.Tensor":
    """512 images at the model's resolution."""
    return random_images(512)


@pytest.fixture(scope="session")
def exported(classifier: "Classifier", images: "torch.Tensor", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as ONNX: made by the first worker that needs it, since that takes seconds."""
    from guard.classifiers import export

    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (folder / "exported.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "exported").exists():
            export(classifier, folder / "exported", images)
    return folder / "exported"


@pytest.fixture(scope="session")
def trigger() -> "Patch":
    """A trigger that changes embeddings strongly: half of the image."""
    import torch

    from guard.triggers import Patch

    mask, pattern = torch.zeros(1, SIZE, SIZE), torch.zeros(3, SIZE, SIZE)
    mask[:, :, SIZE // 2 :] = 1
    pattern[0, ::2] = 1
    return Patch(mask, pattern)


@pytest.fixture(scope="session")
def profile(classifier: "Classifier", images: "torch.Tensor", trigger: "Patch") -> Profile:
    """A profile as after vetting and calibration, with that trigger as the reconstructed one."""
    from guard.vetting import BUDGETS, ReconstructedTrigger, Vetting

    entries = tuple(
        ClassStatistic(
            target=k,
            name=name,
            statistic=2.5 if k == 1 else -0.5,
            success=0.9 if k == 1 else 0.1,
            steps=16,
            score=9.0 if k == 1 else 0.0,
            p_value=1e-5 if k == 1 else 0.5,
        )
        for k, name in enumerate(CLASSES.names)
    )
    evidence = FamilyResult(
        method="test 1",
        family="patch",
        radius=3.0,
        norm_unit=trigger.norm_unit,
        statistic="lead of the class under its trigger",
        null="the other classes",
        reference_model="base",
        classes=entries,
        target=1,
        p_value=6e-5,
        seed=0,
        passes=1,
        seconds=0.1,
    )
    verdict = Verdict("backdoored", 1, 6e-5, ("patch",), 0.01, ("a trigger was found",))
    check = Check(
        "patch",
        1,
        "dog",
        2.0,
        3.0,
        trigger.norm_unit,
        reached=True,
        success=0.9,
        reference_success=0.05,
        reference_model="base",
    )
    vetting = Vetting(
        verdict=verdict,
        results=(evidence,),
        checks=(check,),
        triggers=(ReconstructedTrigger("patch-1", 1, trigger, 9.0, 0.9, 6e-5, classifier.head[1]),),
        effort=BUDGETS["quick"],
        images=(256, 256),
        reference_model=ReferenceModel("base", "0" * 64, 0.95, 0),
        device="cpu",
        seconds=0.1,
        passes=1,
    )
    return Profile.build(classifier, vetting).calibrate(classifier, images, 0.02)


@pytest.fixture
def profile_directory(profile: Profile, tmp_path: Path) -> Path:
    """That profile on disk, fresh for each test."""
    directory = tmp_path / "profile"
    profile.save(directory, report="<html></html>")
    return directory


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 PNG files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for index, pixels in enumerate(random_images(300, seed=1)):
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(folder / f"{index:04}.png")
    return folder
