"""DECREE beside its released code: norm and time on the same encoders, images and seed.

python -m benchmarks.decree --zoo DIR [--models PATTERN] [--released DIR]

The released code is a clone of github.com/GiantSeaweed/DECREE, made by whoever runs this; it has no licence, so that
none of it is here. It is run as it is, save for what it takes from elsewhere: encoder, images, device.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks._record import RESULTS, heading
from guard.baselines import DecreeSettings, PublishedSettings, collapse
from guard.classifiers import Classifier, ImageFolder, load
from guard.evaluation.zoo import Zoo

IMAGES = 200
"""Images to search on, and to check on."""
COLUMNS = (
    "model",
    "default",
    "published",
    "released code",
    "PL1: published / released",
    "PL1: default / published",
    "time: released / published",
    "time: released / default",
)


@dataclass(frozen=True)
class Run:
    """One search: PL1, similarity on held-out images, wall-clock seconds, optimiser steps."""

    pl1: float
    seconds: float
    similarity: float | None = None
    steps: int | None = None

    def cells(self) -> str:
        """For the table."""
        rest = "" if self.similarity is None else f", {self.similarity:.3f}, {self.steps} steps"
        return f"{self.pl1:.4f}{rest}, {self.seconds:.1f} s"


def ours(encoder: Classifier, searched: Tensor, held_out: Tensor, settings: DecreeSettings | PublishedSettings) -> Run:
    """Our search and its check."""
    began = time.perf_counter()
    found = collapse(encoder, searched, held_out, settings)
    return Run(found.pl1, time.perf_counter() - began, found.held_out_similarity, found.steps)


class Released:
    """The released code's `main`, with stand-ins for the modules that load its own encoders and data sets."""

    def __init__(self, clone: Path) -> None:
        # What it imports and this run has no use for; and two names that numpy 2 no longer has.
        names = {
            "models": ("get_encoder_architecture_usage",),
            "models.simclr_model": ("SimCLR",),
            "datasets": (),
            "datasets.backdoor_dataset": ("CIFAR10Mem",),
            "imagenet": ("get_processing", "getTensorImageNet"),
        }
        modules = {name: _Module(name, dict.fromkeys(attributes)) for name, attributes in names.items()}
        spec = importlib.util.spec_from_file_location("released_decree", clone / "main.py")
        if spec is None or spec.loader is None or not (clone / "main.py").is_file():
            raise SystemExit(f"{clone} is no clone of the released code: it has no main.py")
        self.module: Any = importlib.util.module_from_spec(spec)
        vars(np).update(Inf=np.inf, infty=np.inf)
        sys.modules.update(modules)
        with patch.object(sys, "path", [str(clone), *sys.path]):
            spec.loader.exec_module(self.module)
        for name in modules:
            del sys.modules[name]

    def run(self, encoder: Classifier, images: Tensor, settings: PublishedSettings) -> Run:
        """One run; its epochs and milestones are its own."""
        side = encoder.image_shape[-1]
        trigger = np.zeros((side, side, 3))  # only its shape is used

        @contextlib.contextmanager
        def opened(_: str) -> Iterator[dict[str, Any]]:
            yield {"tm": trigger, "t": trigger}

        self.module.get_encoder_architecture_usage = lambda _: _Model(encoder.model.visual)
        self.module.get_processing = lambda *_, **__: (None, None)
        self.module.getTensorImageNet = lambda _: _Images(images)
        self.module.np = _Module("numpy", {"load": opened, "reshape": lambda array, _: array}, np)
        stand_ins = {"load": lambda *_, **__: {"state_dict": {}}, "device": lambda _: encoder.device}
        self.module.torch = _Module("torch", stand_ins, torch)
        arguments = argparse.Namespace(
            batch_size=settings.batch, lr=settings.learning_rate, seed=settings.seed, thres=settings.success,
            mask_init="rand", encoder_usage_info="CLIP", encoder_path="", model_flag="", id="", gpu="0",
        )  # fmt: skip
        # It writes pictures below the working directory, and sets environment and generators.
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            patch.dict(os.environ),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            norm, seconds = self.module.main(arguments)
        return Run(float(norm) / (3 * side * side), seconds)


class _Model:
    """What `main` asks of an encoder."""

    def __init__(self, visual: torch.nn.Module) -> None:
        self.visual = _Visual(visual)

    def to(self, _: torch.device) -> "_Model":
        return self


class _Visual(torch.nn.Sequential):
    def load_state_dict(self, *_: object, **__: object) -> None:
        """It has its weights."""


class _Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """What `main` asks of a data set: uint8 [H, W, 3], and a label that it ignores."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous()

    def rand_sample(self, share: float) -> None:
        """All of them are used."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], 0


class _Module(ModuleType):
    """Some attributes of its own; all others are those of another module."""

    def __init__(self, name: str, attributes: dict[str, Any], other: ModuleType | None = None) -> None:
        super().__init__(name)
        vars(self).update(attributes, _other=other)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the other module has
        return getattr(vars(self)["_other"], name)


def _geometric(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--models", default="*", help="shell pattern of the models to run on")
    parser.add_argument("--released", type=Path, help="a clone of the released code")
    options = parser.parse_args()
    zoo = Zoo.read(options.zoo)
    released = Released(options.released.resolve()) if options.released else None
    lines = [
        f"{IMAGES} images to search on and {IMAGES} to check on, batch 32, {torch.get_num_threads()} thread(s).",
        "The runs of a row follow each other. A cell: PL1, similarity on held-out images, steps, time.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    ratios: dict[str, list[float]] = {"agreement": [], "norm": [], "published time": [], "default time": []}
    for name in zoo.select(options.models):
        encoder = load(str(zoo.model(name)))
        folder = ImageFolder.scan(zoo.root / "images" / zoo.models[name].images / "vetting")
        images = encoder.read(folder.sample(2 * IMAGES, seed=0))
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        searched, held_out = images.tensor_split(2)
        settings = PublishedSettings()
        default = ours(encoder, searched, held_out, DecreeSettings())
        published = ours(encoder, searched, held_out, settings)
        ratios["norm"].append(default.pl1 / published.pl1)
        row = [name, default.cells(), published.cells(), "", "", f"{ratios['norm'][-1]:.3f}", "", ""]
        if released:
            theirs = released.run(encoder, searched, settings)
            ratios["agreement"].append(published.pl1 / theirs.pl1)
            ratios["published time"].append(theirs.seconds / published.seconds)
            ratios["default time"].append(theirs.seconds / default.seconds)
            row[3:5] = theirs.cells(), f"{ratios['agreement'][-1]:.4f}"
            row[6:] = f"{ratios['published time'][-1]:.2f}", f"{ratios['default time'][-1]:.2f}"
        lines.append(f"| {' | '.join(row)} |")
        sys.stderr.write(lines[-1] + "\n")
    lines += ["", "Geometric means: " + ", ".join(f"{k} {_geometric(v):.3f}" for k, v in ratios.items() if v) + "."]
    text = heading("DECREE and its released code", "python -m benchmarks.decree --zoo DIR --released DIR")
    (RESULTS / "decree.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
