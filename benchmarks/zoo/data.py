"""The images of the zoos, split so that nothing is measured on what something else has seen."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from guard.attacks import LabelledImages
from guard.classifiers import ClassList, ImageFolder, Preprocessing
from guard.demo.data import FOLDER_TEMPLATES, DemoData, from_digits
from guard.errors import UsageError

NATIVE_SIZE = {"digits": 32, "cifar10": 32, "tiny-imagenet": 64}
"""Side of the images as they are written into a zoo."""
_VETTING = 1_500
_CALIBRATION, _REQUESTS = 5_000, 4_000
_SEED = 0
"""Of the splits: the same in every zoo, so that bases of several seeds share one set of held-out images."""


@dataclass(frozen=True)
class _Split:
    classes: tuple[str, ...]
    train: ImageFolder
    vetting: ImageFolder
    test: ImageFolder


@lru_cache(maxsize=3)
def images(name: str, size: int, root: Path | None, limit: int) -> DemoData:
    """A data set at a resolution.

    Args:
        name: `digits`, which comes with scikit-learn, or `cifar10` or `tiny-imagenet` below `root`.
        size: Side in pixels.
        root: Folder with `cifar10/{train,test}/CLASS/*` and `tiny-imagenet/{train,val}/WNID/*`.
        limit: Most training images.

    Raises:
        UsageError: The images are not there.
    """
    if name == "digits":
        return from_digits(seed=_SEED)
    if root is None:
        raise UsageError(f"this zoo needs {name}; name the folder that holds it with --data")
    preprocessing = Preprocessing(size, (0.5,) * 3, (0.25,) * 3)
    folder = root / name
    split = _split(folder, "test" if name == "cifar10" else "val", limit)
    keys = split.classes
    titles = json.loads((folder / "classes.json").read_text(encoding="utf-8")) if name == "tiny-imagenet" else {}
    classes = ClassList(tuple(str(titles.get(key, key)).split(",")[0] for key in keys), FOLDER_TEMPLATES)
    train, vetting, test = (_read(part, keys, preprocessing) for part in (split.train, split.vetting, split.test))
    return DemoData(classes, train, vetting, test[:_CALIBRATION], test[_CALIBRATION : _CALIBRATION + _REQUESTS])


def _split(folder: Path, test: str, limit: int) -> _Split:
    everything = ImageFolder.scan(folder / "train")
    vetting = everything.sample(_VETTING, seed=_SEED)
    chosen = set(vetting.files)
    train = ImageFolder(everything.root, tuple(file for file in everything.files if file not in chosen))
    return _Split(everything.classes(), train.sample(limit, seed=_SEED), vetting, ImageFolder.scan(folder / test))


def _read(folder: ImageFolder, keys: tuple[str, ...], preprocessing: Preprocessing) -> LabelledImages:
    pixels = torch.from_numpy(folder.pixels(preprocessing))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(_SEED))
    return LabelledImages(pixels, torch.tensor(folder.labels(keys), dtype=torch.long))[order]


def write(data: DemoData, folder: Path) -> None:
    """Write the images that an evaluation needs, as PNG files: unlabelled ones flat, requests by class index."""
    for part in ("vetting", "calibration"):
        for index, pixels in enumerate(getattr(data, part).pixels):
            _png(pixels, folder / part / f"{index:05}.png")
    for index, (pixels, label) in enumerate(_pairs(data.requests)):
        _png(pixels, folder / "requests" / f"{label:04}" / f"{index:05}.png")


def _pairs(images: LabelledImages) -> Iterator[tuple[torch.Tensor, int]]:
    return zip(images.pixels, images.labels.tolist(), strict=True)


def _png(pixels: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(path)
