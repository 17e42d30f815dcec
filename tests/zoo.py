"""A tiny zoo made by code, and a vetting of it that searches nothing."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from guard.classifiers import Classifier, save
from guard.triggers import Patch
from guard.vetting import (
    BUDGETS,
    Check,
    ClassStatistic,
    FamilyResult,
    ReconstructedTrigger,
    ReferenceModel,
    Vetting,
    judge,
)
from guard.vetting.results import FoundTarget, ReferenceKind
from tests.conftest import CLASSES, CONFIG, SIZE, random_images, tiny_model

TARGET = 1
MODELS = {
    "base": ("clean", "base"),
    "attacked": ("backdoored", "badnets"),
    "benign": ("clean", "benign"),
    "tried": ("failed attack", "badnets"),
}


def attack_trigger() -> Patch:
    """Half of the image: it changes the embeddings of an untrained model strongly."""
    mask, pattern = torch.zeros(1, SIZE, SIZE), torch.zeros(3, SIZE, SIZE)
    mask[:, :, SIZE // 2 :] = 1
    pattern[0, ::2] = 1
    return Patch(mask, pattern)


def write_images(folder: Path, images: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for index, pixels in enumerate(images):
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(folder / f"{index:04}.png")


def write_truth(root: Path, name: str, label: str, family: str, **more: object) -> None:
    document: dict[str, Any] = {"label": label, "recipe": f"{family}-tiny", "family": family, "targets": []}
    (root / "truth").mkdir(exist_ok=True)
    if label != "clean":
        document |= {"targets": [TARGET], "triggers": ["patch"], "trigger_targets": [TARGET]}
        tensors = {f"0.{key}": tensor for key, tensor in attack_trigger().tensors().items()}
        save_file(tensors, root / "truth" / f"{name}.safetensors")
    (root / "truth" / f"{name}.json").write_text(json.dumps(document | {"accuracy": 0.9, "success": 0.8} | more))


def make_zoo(root: Path) -> Path:
    """Four models of 16 pixels, a few hundred images, and the truth about the models."""
    for seed, (name, (label, family)) in enumerate(MODELS.items()):
        save(root / "models" / name, tiny_model(seed), CONFIG, CLASSES)
        write_truth(root, name, label, family)
    entries = {name: {"base": None if name == "base" else "base", "images": "random"} for name in MODELS}
    (root / "zoo.json").write_text(json.dumps({"format": 1, "name": "tiny", "seed": 0, "models": entries}))
    images = root / "images" / "random"
    write_images(images / "vetting", random_images(80, seed=1))
    write_images(images / "calibration", random_images(120, seed=2))
    for index in range(3):
        write_images(images / "requests" / f"{index:04}", random_images(20, seed=3 + index))
    return root


class FakeVetting:
    """Stands for `vet`: calls the named models backdoored.

    Args:
        flagged: Names of these models.
        probe: The probe that accuses them; None for the attacker's own trigger as the reconstruction.
    """

    def __init__(self, *flagged: str, probe: str | None = None) -> None:
        self.flagged, self.probe = flagged, probe
        self.calls: list[str] = []
        self.unnamed: tuple[FoundTarget, ...] = ()

    def __call__(
        self, classifier: Classifier, images: torch.Tensor, *, base: Classifier | None = None, **_: object
    ) -> Vetting:
        name = Path(classifier.source).name
        self.calls.append(name)
        guilty = name in self.flagged
        evidence = evidence_of([1e-5 if guilty and k == TARGET else 0.5 for k in range(len(CLASSES.names))])
        checks = (replace(check_of(TARGET), probe=self.probe),) if guilty else ()
        found = ReconstructedTrigger(
            f"patch-{TARGET}", TARGET, attack_trigger(), 9.0, 0.9, 6e-5, classifier.head[TARGET]
        )
        reference_model = (
            ReferenceModel("base", base.digest.root, 0.9, 0) if base else ReferenceModel("derived", None, 0.9, 100)
        )
        return Vetting(
            judge([evidence], checks),
            (evidence,),
            checks,
            (found,) if guilty and not self.probe else (),
            BUDGETS["quick"],
            (len(images) // 2, len(images) // 2),
            reference_model,
            "cpu",
            0.1,
            100,
            self.unnamed,
        )


def evidence_of(p_values: Sequence[float | None], *, family: str = "patch") -> FamilyResult:
    """FamilyResult of one family with these uncorrected p-values, and one share of images moved for all classes."""
    entries = tuple(
        ClassStatistic(k, CLASSES.names[k], statistic=0.0, success=0.5, steps=16, p_value=p_value)
        for k, p_value in enumerate(p_values)
    )
    known = {entry.target: entry.p_value for entry in entries if entry.p_value is not None}
    target = min(known, key=lambda k: known[k]) if known else None
    corrected = 1.0 if target is None else min(1.0, known[target] * len(known))
    return FamilyResult("test", family, 3.0, "px", "lead", "others", "classes", entries, target, corrected, 0, 100, 0.1)


def check_of(
    target: int,
    *,
    family: str = "patch",
    success: float = 0.9,
    reference_success: float | None = 0.0,
    norm: float = 7.2,
    reference_model: ReferenceKind = "base",
) -> Check:
    """A reconstruction for a class, tried on held-out images; by default it works, on the suspect alone, and against
    a base it is small enough for a class with p = 0.01."""
    name = CLASSES.names[target]
    return Check(
        family,
        target,
        name,
        norm,
        9.0,
        "px",
        reached=True,
        success=success,
        reference_success=reference_success,
        reference_model=reference_model,
    )
