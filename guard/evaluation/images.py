"""The images of a zoo in three parts, at a model's resolution."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from guard.classifiers import ImageFolder, Preprocessing
from guard.classifiers.digest import canonical, sha256
from guard.errors import ImageError

MAX_CALIBRATION, MAX_REQUESTS = 5000, 5000
"""Largest number of images of each part that are used; larger parts are sampled."""


@dataclass(frozen=True)
class ImageSet:
    """Three parts of a set of images, which have no image in common.

    Attributes:
        vetting: Unlabelled images on which triggers are searched.
        calibration: Clean images on which screening thresholds are set; None if there are none.
        requests: Clean images that are used for nothing but the measurements; None if there are none.
        digest: SHA-256 over the names and contents of the files of each part.
    """

    vetting: ImageFolder
    calibration: ImageFolder | None
    requests: ImageFolder | None
    digest: str

    @classmethod
    def of_zoo(cls, folder: Path, *, vetting: int, seed: int) -> Self:
        """The set `images/DATA` of a zoo, with at most `vetting` images to search on.

        Raises:
            ImageError: There are no images to search on, a part is empty, or a file cannot be read.
        """
        parts = {
            part: ImageFolder.scan(folder / part).sample(limit, seed=seed) if (folder / part).is_dir() else None
            for part, limit in (("calibration", MAX_CALIBRATION), ("requests", MAX_REQUESTS))
        }
        searched = ImageFolder.scan(folder / "vetting").sample(vetting, seed=seed)
        return cls._of(searched, parts["calibration"], parts["requests"])

    @classmethod
    def of_folder(cls, folder: Path, *, vetting: int, seed: int) -> Self:
        """One folder of unlabelled images, split at random.

        At most `vetting` images are for vetting; of the others two thirds are for calibration, one third are requests.

        Raises:
            ImageError: The folder contains no image, or a file cannot be read.
        """
        everything = ImageFolder.scan(folder)
        searched = everything.sample(vetting, seed=seed)
        taken = set(searched.files)
        rest = ImageFolder(folder, tuple(file for file in everything.files if file not in taken))
        calibration = rest.sample(len(rest) * 2 // 3, seed=seed)
        taken = set(calibration.files)
        requests = ImageFolder(folder, tuple(file for file in rest.files if file not in taken))
        return cls._of(
            searched,
            calibration.sample(MAX_CALIBRATION, seed=seed) if len(calibration) else None,
            # The names of sub-folders in an arbitrary folder are labels at most by accident.
            requests.sample(MAX_REQUESTS, seed=seed) if len(requests) else None,
        )

    @classmethod
    def _of(cls, vetting: ImageFolder, calibration: ImageFolder | None, requests: ImageFolder | None) -> Self:
        parts = (vetting, calibration, requests)
        lines = [part and [_digest(file, part.root) for file in part.files] for part in parts]
        return cls(*parts, sha256(canonical(lines)))


def _digest(file: Path, root: Path) -> list[str]:
    try:
        return [str(file.relative_to(root)), sha256(file.read_bytes())]
    except OSError as error:
        raise ImageError(f"cannot read {file}: {error.strerror}") from error


class Pixels:
    """The pixels of an image set after one preprocessing, read when they are first used and then kept.

    Args:
        images: The image set.
        preprocessing: The preprocessing of the model that will see them.
    """

    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self._images, self._preprocessing = images, preprocessing

    @cached_property
    def vetting(self) -> Tensor:
        """uint8, shape [N, 3, H, W]."""
        return self._read(self._images.vetting)

    @cached_property
    def calibration(self) -> Tensor | None:
        """uint8, shape [N, 3, H, W]; None without calibration images."""
        return self._read(self._images.calibration) if self._images.calibration else None

    @cached_property
    def requests(self) -> Tensor | None:
        """uint8, shape [N, 3, H, W]; None without requests."""
        return self._read(self._images.requests) if self._images.requests else None

    @cached_property
    def labels(self) -> Tensor | None:
        """int64, shape [N]: class index of each request; None where the folders are not named by class indices."""
        folder = self._images.requests
        if folder is None:
            return None
        names = [file.relative_to(folder.root).parts[0] for file in folder.files]
        if not all(len(name) == 4 and name.isascii() and name.isdigit() for name in names):
            return None
        return torch.from_numpy(np.array([int(name) for name in names], np.int64))

    def _read(self, folder: ImageFolder) -> Tensor:
        return torch.from_numpy(folder.pixels(self._preprocessing))


@lru_cache(maxsize=1)
def pixels(images: ImageSet, preprocessing: Preprocessing) -> Pixels:
    """The pixels of a set after one preprocessing; each process keeps those of the last set."""
    return Pixels(images, preprocessing)
