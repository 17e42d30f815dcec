"""Untrusted images: bounded decoding, and the images of a folder."""

import io
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from guard.classifiers.preprocessing import MAX_PIXELS, Preprocessing
from guard.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Pillow's own warning has a fixed limit; `decode` enforces the limit that applies here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one encoded image completely.

    The size is read from the header and checked before any pixel is decoded, so that a small file that claims
    huge dimensions costs nothing. EXIF orientation is ignored, as torchvision and open_clip ignore it.

    Args:
        data: A JPEG, PNG or WebP file.
        max_pixels: Largest width × height that is decoded.

    Raises:
        ImageError: The bytes are not an image of these formats, are damaged, or claim more than `max_pixels` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"the image claims {width}×{height} pixels, more than the limit of {max_pixels}; send a smaller one"
            )
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the image claims more pixels than the limit of {max_pixels}; send a smaller one") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not a readable {', '.join(FORMATS)} image ({len(data)} bytes)") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        # Pillow's decoders report damage through all of these.
        raise ImageError(f"the image is damaged: {error}") from error
    return image


def _read(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The pixels of one file at the resolution of a model; an error names the file."""
    try:
        return preprocessing.pixels(decode(path.read_bytes()))
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    except ImageError as error:
        raise ImageError(f"cannot use {path}: {error}; repair it or take it out of the folder") from error


@dataclass(frozen=True)
class ImageFolder:
    """The image files below a folder, in sorted order.

    Attributes:
        root: The folder.
        files: Every JPEG, PNG and WebP file below it.
    """

    root: Path
    files: tuple[Path, ...]

    @classmethod
    def scan(cls, root: Path | str) -> "ImageFolder":
        """Find the images below `root`, at any depth; hidden files are left out.

        Raises:
            ImageError: The folder does not exist or contains no image.
        """
        root = Path(root)
        if not root.is_dir():
            raise ImageError(f"there is no folder {root}")
        files = sorted(
            path
            for path in root.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        if not files:
            raise ImageError(f"the folder {root} contains no image ({', '.join(SUFFIXES)})")
        return cls(root, tuple(files))

    def __len__(self) -> int:
        return len(self.files)

    def classes(self) -> tuple[str, ...]:
        """Sorted names of the sub-folders that contain images; each is one class.

        Raises:
            ImageError: An image lies directly in the root, or there is only one sub-folder.
        """
        if loose := next((file for file in self.files if file.parent == self.root), None):
            raise ImageError(f"{loose} lies outside any class; put each class in a sub-folder of {self.root}")
        names = tuple(sorted({file.relative_to(self.root).parts[0] for file in self.files}))
        if len(names) < 2:
            raise ImageError(f"{self.root} has one class only ({names[0]}); at least two sub-folders are needed")
        return names

    def labels(self, classes: Sequence[str]) -> tuple[int, ...]:
        """The index of each file's class."""
        index = {name: i for i, name in enumerate(classes)}
        return tuple(index[file.relative_to(self.root).parts[0]] for file in self.files)

    def sample(self, limit: int, *, seed: int) -> "ImageFolder":
        """At most `limit` of the images, drawn at random, in sorted order."""
        if len(self.files) <= limit:
            return self
        return ImageFolder(self.root, tuple(sorted(random.Random(seed).sample(self.files, limit))))  # noqa: S311

    def pixels(
        self, preprocessing: Preprocessing, progress: Callable[[str, int, int], None] = lambda *_: None
    ) -> NDArray[np.uint8]:
        """Every image at the resolution of a model: uint8, shape [N, 3, size, size].

        Raises:
            ImageError: A file cannot be decoded, or its image is too narrow; the error names the file.
        """
        pixels = np.empty((len(self.files), 3, preprocessing.size, preprocessing.size), np.uint8)
        for index, file in enumerate(self.files):
            pixels[index] = _read(file, preprocessing)
            progress("reading images", index + 1, len(self.files))
        return pixels
