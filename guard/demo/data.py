"""The demo's images, split so that nothing is measured on images that an earlier step has used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from guard.attacks import LabelledImages
from guard.classifiers import ClassList, ImageFolder, Preprocessing
from guard.demo import digits
from guard.errors import ImageError

MIN_IMAGES = 2000
MAX_IMAGES = 20_000
FOLDER_TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "an image of a {}.", "a small photo of a {}.")


@dataclass(frozen=True)
class DemoData:
    """Disjoint sets of labelled images, and their classes.

    Attributes:
        classes: Names and templates.
        train: Images for all training.
        vetting: Images on which vetting searches; their labels are not used.
        calibration: Images for banks and threshold; their labels are not used.
        requests: Images that are sent to the sidecar; accuracy is measured on them too.
        groups: For each calibration image, the index of the original that it shows; None if no two share one.
    """

    classes: ClassList
    train: LabelledImages
    vetting: LabelledImages
    calibration: LabelledImages
    requests: LabelledImages
    groups: NDArray[np.int64] | None = None


def from_digits(*, seed: int) -> DemoData:
    """scikit-learn's digits; all renderings of one digit stay in one set."""
    images, original = digits.digits(6, seed=seed)
    rendering = torch.arange(len(images)) // digits.COUNT

    def part(low: int, high: int, renderings: int) -> LabelledImages:
        return images[(original >= low) & (original < high) & (rendering < renderings)]

    parts = part(0, 800, 2), part(800, 1000, 2), part(1000, 1500, 6), part(1500, 1797, 2)
    calibration = (original >= 1000) & (original < 1500)
    return DemoData(digits.CLASSES, *parts, groups=original[calibration].numpy())


def from_folder(
    root: Path,
    preprocessing: Preprocessing,
    *,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> DemoData:
    """A folder with one sub-folder per class: 55 % for training, 10 % vetting, 20 % calibration, 15 % requests.

    Raises:
        ImageError: The folder is not of this form, an image is damaged, or there are too few.
    """
    folder = ImageFolder.scan(root)
    names = folder.classes()
    folder = folder.sample(MAX_IMAGES, seed=seed)
    if len(folder) < MIN_IMAGES:
        raise ImageError(f"the demo needs at least {MIN_IMAGES} images to train on, {root} has {len(folder)}")
    images = LabelledImages(
        torch.from_numpy(folder.pixels(preprocessing, progress)), torch.tensor(folder.labels(names), dtype=torch.long)
    )
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    train, vetting, calibration = (round(share * len(images)) for share in (0.55, 0.65, 0.85))
    classes = ClassList(tuple(name.replace("_", " ") for name in names), FOLDER_TEMPLATES)
    return DemoData(classes, images[:train], images[train:vetting], images[vetting:calibration], images[calibration:])
