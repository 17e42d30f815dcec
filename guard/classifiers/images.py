"""Untrusted images: bounded decoding, and the images of a folder."""

import io
import itertools
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from guard._documents import read_bytes
from guard.classifiers.preprocessing import MAX_PIXELS, Preprocessing
from guard.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
_PNG_DEPTH = 24
"""Offset of the number of bits per channel in a PNG file: its header is always the first chunk."""
_ONCE = {"JPEG": (b"Exif\0",), "PNG": (b"eXIf", b"IHDR", b"PLTE"), "WEBP": (b"EXIF", b"VP8X")}
"""What begins parts of a file that may be there once; of two, some programs take the first and some the last."""
_YCBCR = ((1, 2, 3), (0, 1, 2))
"""Numbers of the components of a JPEG file that every decoder takes for Y, Cb and Cr."""
_AREAS = 4
"""Number of areas in each direction over which the pixels of an image are averaged, to compare ways to resize it."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SYSTEM_FOLDERS = frozenset({"@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""Names of folders that a system makes by itself, and whose images are copies or nobody's."""
_MAX_FOLDERS = 200_000
"""Folders that are looked at: links among a few can lead to any number of ways."""
_MAX_BYTES = 512 * 2**20
"""Largest file of an image; the largest image that is decoded is smaller without any compression."""

# Pillow's own warning has a fixed limit; `decode` enforces the limit that applies here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of one encoded image completely, as 8-bit RGB without metadata.

    Whatever an image holds besides 8-bit RGB pixels is settled here, before anything is resized: a palette is looked
    up, the high byte of 16-bit values is kept, alpha is dropped, and orientation and colour profiles are ignored, as
    torchvision and open_clip ignore them. (open_clip resizes before it converts, so that a palette image is resized
    without interpolation and alpha weighs the pixels; hardly any server does that.)

    Args:
        data: A JPEG, PNG or WebP file.
        max_pixels: Largest width × height that is decoded.

    Raises:
        ImageError: The bytes are not an image of these formats, are damaged, or claim more than `max_pixels` pixels.
        MemoryError: There is not enough memory for the image.
    """
    return _rgb(_load(data, max_pixels))


def decode_unambiguous(data: bytes, *, size: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as `decode` does, and refuse one that another program may well see differently.

    Args:
        data: A JPEG, PNG or WebP file.
        size: Side of the model's input, in pixels.
        max_pixels: Largest width × height that is decoded.

    Raises:
        ImageError: As `decode`; or the image has a palette, alpha or transparency, 16-bit or CMYK values, an
            orientation, several frames, or looks different if it is resized in another way.
        MemoryError: There is not enough memory for the image.
    """
    image = _load(data, max_pixels)
    rgb = _rgb(image)
    try:
        why = _ambiguity(image, data) or _resampling_ambiguity(rgb, size)
    except Exception as error:
        raise ImageError(f"the image's metadata are damaged: {error}") from error
    if why:
        raise ImageError(f"the image {why}, which programs read in different ways; send it as plain 8-bit RGB")
    return rgb


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG file of an image, which every decoder reads as exactly these pixels.

    It is neither filtered nor compressed: Pillow needs 3.3 ms for 224 × 224 pixels, because it tries filters even
    where it does not compress, and this 0.2 ms.

    Args:
        pixels: Shape [3, H, W].
    """
    _, height, width = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with the number of its filter: 0 for none
    rows[:, 1:] = pixels.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """Decode the first frame of an image.

    The size is read from the header and checked before any pixel is decoded, so that a small file that claims huge
    dimensions costs nothing.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            image.load()
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the image claims more pixels than the limit of {max_pixels}; send a smaller one") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not a readable {', '.join(FORMATS)} image ({len(data)} bytes)") from error
    except Exception as error:
        # Pillow's decoders and readers of metadata report damage through any exception, also IndexError and
        # struct.error, and which ones changes with its version.
        raise ImageError(f"the image is damaged: {error}") from error
    if width * height > max_pixels:
        raise ImageError(
            f"the image claims {width}×{height} pixels, more than the limit of {max_pixels}; send a smaller one"
        )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would cut off all values above 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _ambiguity(image: Image.Image, data: bytes) -> str | None:
    """What about a decoded image is read differently by different programs; None if nothing is."""
    if image.mode not in {"RGB", "L"}:
        return f"has the colour mode {image.mode}"
    if "transparency" in image.info:
        return "has a transparent colour"
    if image.format == "PNG" and data[_PNG_DEPTH] != 8:
        return f"has {data[_PNG_DEPTH]} bits per channel"
    if getattr(image, "n_frames", 1) != 1:
        return "has several frames"
    if image.format in _ONCE and any(data.count(mark) > 1 for mark in _ONCE[image.format]):
        return "has the same metadata twice"
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return "has an orientation"
    components = tuple(layer[0] for layer in getattr(image, "layer", ()))
    if image.info.get("adobe_transform", 1) != 1 or (len(components) == 3 and components not in _YCBCR):
        return "does not say how its colours are stored"
    return None


def _resampling_ambiguity(image: Image.Image, size: int) -> str | None:
    """Whether an image looks different if a program picks pixels instead of averaging them; None if it does not.

    Pixels between those that a program picks may hold another picture. So the means over large areas are compared: they
    hardly depend on the way in which an ordinary photograph is resized.
    """
    if max(image.size) <= size:
        return None
    pixels, areas = np.asarray(image), (_AREAS, _AREAS)
    averaged = np.asarray(image.resize(areas, Image.Resampling.BOX), np.float32)
    change = 0.0
    for phase in (0.0, 0.25, 0.5, 0.75, 0.999):
        rows, columns = (((np.arange(size) + phase) * side / size).astype(int) for side in pixels.shape[:2])
        picked = Image.fromarray(pixels[rows[:, None], columns]).resize(areas, Image.Resampling.BOX)
        change = max(change, float(np.abs(averaged - np.asarray(picked, np.float32)).max()))
    # Of 200 photographs, none or one exceeds this at each of the sizes 16, 28, 32, 64 and 224.
    allowed = max(12.0, 1280 / size)
    return f"changes with the way it is resized (by {change:.0f} of 255)" if change > allowed else None


def _read(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The pixels of one file at the resolution of a model; an error names the file."""
    data = read_bytes(path, _MAX_BYTES, ImageError)
    try:
        return preprocessing.pixels(decode(data))
    except ImageError as error:
        raise ImageError(f"cannot use {path}: {error}; repair it or take it out of the folder") from error


def _images_below(root: Path) -> Iterator[Path]:
    """Every image below a folder; errors as `ImageFolder.scan` has them."""
    # Each folder with those above it, by what they are and not by their names.
    todo: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    for count in itertools.count(1):
        if not todo:
            return
        if count > _MAX_FOLDERS:
            raise ImageError(f"there are more than {_MAX_FOLDERS} folders below {root}, with links that lead to others")
        folder, above = todo.pop()
        try:
            status = folder.stat()
            identity = status.st_dev, status.st_ino
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                kinds = {entry.name: _kind(entry) for entry in entries if not entry.name.startswith(".")}
        except OSError as error:
            raise ImageError(f"cannot read the folder {folder}: {error.strerror}") from error
        if broken := next((folder / name for name in sorted(kinds) if kinds[name] == "broken"), None):
            raise ImageError(
                f"{broken} is a link that leads nowhere or cannot be followed, or neither a file nor a folder; take it "
                "away, or repair it"
            )
        folders = [name for name, kind in kinds.items() if kind == "folder" and name not in SYSTEM_FOLDERS]
        todo += [(folder / name, above | {identity}) for name in folders]
        yield from (folder / name for name, kind in kinds.items() if kind == "image")


def _kind(entry: "os.DirEntry[str]") -> Literal["folder", "image", "broken", "other"]:
    named = Path(entry.name).suffix.lower() in SUFFIXES
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "image" if named else "other"
    except OSError:  # links in a circle, or into a folder that cannot be entered
        return "broken"
    # Sockets and the like are nobody's images, unless they say so.
    return "broken" if named or entry.is_symlink() else "other"


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
        """Find the images below `root`, at any depth, as its user sees them.

        Links are followed, to files and to folders; a link that leads back to a folder above it is not followed again.
        Hidden files and folders are left out, and so are those that systems add by themselves (`SYSTEM_FOLDERS`).

        Raises:
            ImageError: The folder does not exist or contains no image; or a part of it cannot be read, leads nowhere,
                or is neither a file nor a folder: what is left out in silence is missed by nobody.
        """
        root = Path(root)
        if not root.is_dir():
            raise ImageError(f"there is no folder {root}")
        files = sorted(_images_below(root))
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
