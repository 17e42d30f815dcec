"""A backdoored toy classifier, the clean one that it comes from, and a profile that compares the two."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import guard
from guard.classifiers import Classifier, Preprocessing, export
from guard.profiles import Profile
from guard.vetting import BUDGETS, ReferenceModel, Verdict, Vetting
from tests.conftest import SIZE, random_images
from tests.toy import checkerboard, toy

ALPHA = 0.02


@dataclass(frozen=True)
class Compared:
    """What a sidecar needs to ask for second opinions.

    Attributes:
        model: The exported suspect, which goes to `class 3` for images with a checkerboard. No vetting found that.
        profile: A profile with the base as the reference model; its input is normalised differently.
        plain: A profile of the same model without a reference model.
        suspect: The suspect.
        base: The base.
    """

    model: Path
    profile: Path
    plain: Path
    suspect: Classifier
    base: Classifier


def clean(count: int, seed: int = 5) -> Tensor:
    """Images as those of the calibration: uint8, shape [count, 3, SIZE, SIZE]."""
    return random_images(count, seed=seed)


def triggered(count: int, seed: int = 6) -> Tensor:
    """Images with a faint checkerboard."""
    return (random_images(count, seed=seed) + 12 * checkerboard()).clip(0, 255).round().to(torch.uint8)


def opposed(count: int, seed: int = 7) -> Tensor:
    """Images with the opposite of a checkerboard, which are unlike all others to the suspect."""
    return (random_images(count, seed=seed) - 60 * checkerboard()).clip(0, 255).round().to(torch.uint8)


def compared(folder: Path) -> Compared:
    """Calibrate and export both models, without a vetting."""
    torch.manual_seed(0)
    suspect, base = toy(target=3, jitter=0.05), based(0.5)
    images = random_images(700, seed=1)
    bare = Profile.build(suspect, unfounded(suspect))
    asked = bare.calibrate(suspect, images, ALPHA, reference=base)
    for name, classifier in (("model", suspect), ("base", base)):
        export(classifier, folder / name, images[:256])
    asked.with_reference_model(folder / "base").save(folder / "profile")
    bare.calibrate(suspect, images, ALPHA).save(folder / "plain")
    return Compared(folder / "model", folder / "profile", folder / "plain", suspect, base)


def based(mean: float) -> Classifier:
    """The clean classifier, with another normalisation, which its embeddings do not depend on."""
    made = toy()
    return Classifier(
        made.model, {"base": mean}, made.tokenizer, Preprocessing(SIZE, (mean,) * 3, (0.25,) * 3), made.classes,
        source="base", device=made.device,
    )  # fmt: skip


def recalibrated(made: Compared, folder: Path, mean: float) -> None:
    """Write the profile of the same model with another reference model into a folder."""
    base, images = based(mean), random_images(700, seed=1)
    export(base, folder.parent / "other-base", images[:256])
    again = guard.Profile.open(made.profile).calibrate(made.suspect, images, ALPHA, reference=base)
    again.with_reference_model(folder.parent / "other-base").save(folder)


def unfounded(classifier: Classifier) -> Vetting:
    """A vetting that found nothing."""
    return Vetting(
        verdict=Verdict("no evidence", None, 0.5, (), 0.01, ("nothing was found",)),
        results=(),
        checks=(),
        triggers=(),
        effort=BUDGETS["quick"],
        images=(256, 256),
        reference_model=ReferenceModel("base", "0" * 64, 0.95, 0),
        device=str(classifier.device),
        seconds=0.1,
        passes=1,
    )
