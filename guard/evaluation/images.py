"""The images of a zoo, in their three parts, at a model's resolution."""

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
"""Most images of each part that are used; larger parts are sampled."""


@dataclass(frozen=True)
class ImageSet:
    """Which images are used for what; the parts have no image in common.

    Attributes:
        vetting: To search triggers on; unlabelled.
        calibration: Clean, to set screening thresholds on; None if there are none.
        requests: Clean, seen by nothing else: what is measured is measured on these; None if there are none.
        digest: SHA-256 over the contents of all files and their parts.
    """

    vetting: ImageFolder
    calibration: ImageFolder | None
    requests: ImageFolder | None
    digest: str

    @classmethod
    def of_zoo(cls, folder: Path, *, vetting: int, seed: int) -> Self:
        """The set `images/DATA` of a zoo, with at most `vetting` images to search on.

        Raises:
            ImageError: There is nothing to search on, a part is empty, or a file cannot be read.
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

        At most `vetting` are searched on; of the rest two thirds calibrate and one third are requests.

        Raises:
            ImageError: The folder holds no image, or a file cannot be read.
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
            # A folder of anybody's has labels at most by accident.
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
    """The pixels of an image set at one preprocessing, read when they are first used and then kept.

    Args:
        images: Which.
        preprocessing: Of the model that will see them.
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
        """int64, shape [N]: class index of each request; None where their folders name none."""
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
    """The pixels of a set at one preprocessing; those of the last set are kept within a process."""
    return Pixels(images, preprocessing)
