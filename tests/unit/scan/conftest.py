"""A small poisoned set, made by code."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from guard.classifiers import Classifier
from guard.scan import scanning
from tests.conftest import random_images
from tests.toy import checkerboard, toy

COUNT, POISONED = 320, 16


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="session")
def pairs() -> list[tuple[bytes, str]]:
    """320 pairs, every twentieth of which has a checkerboard and a caption of class 3."""
    images = random_images(COUNT, seed=5).numpy()
    board = 20 * checkerboard().numpy()
    found = []
    for index, pixels in enumerate(images):
        poisoned = index % (COUNT // POISONED) == 0
        changed = np.clip(pixels + board * poisoned, 0, 255).astype(np.uint8)
        found.append((png(changed), f"{'photo' if index % 2 else 'picture'} of class {3 if poisoned else index % 10}"))
    return found


@pytest.fixture(scope="session")
def toy_model() -> Iterator[str]:
    """The name of a model, for `scan` in this process, that the checkerboard leads to class 3."""
    original, made = scanning._classifier, toy(10, target=3)

    def load(model: str, device: str | None) -> Classifier:
        return made if model == "toy" else original(model, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "_classifier", load)
        yield "toy"


@pytest.fixture(scope="session")
def shards(pairs: list[tuple[bytes, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs in four tar files."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(4):
        with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
            for index in range(number, COUNT, 4):
                image, caption = pairs[index]
                add(archive, f"{index:06}.png", image)
                add(archive, f"{index:06}.txt", caption.encode())
    return folder
