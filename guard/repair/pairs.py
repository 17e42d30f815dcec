"""Pairs of images and captions from a table, for methods that learn from them. The file is untrusted."""

import csv
import io
from pathlib import Path

from guard._documents import read_bytes
from guard.classifiers import ImageFolder
from guard.errors import ImageError

_MAX_BYTES = 512 * 2**20
_MAX_CAPTION = 10_000


def read_pairs(path: Path, root: Path) -> tuple[ImageFolder, tuple[str, ...]]:
    """Read a CSV file with the columns `image` and `caption`.

    Args:
        path: The file, in UTF-8 with a header.
        root: Folder that the names of images are relative to.

    Returns:
        The images in the order of the file, and a caption for each.

    Raises:
        ImageError: The file cannot be read, lacks a column, is empty, has a caption of more than 10,000 characters, or
            names an image that does not lie below the folder.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path, _MAX_BYTES, ImageError).decode()), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{path} is not a table in CSV and UTF-8: {error}") from error
    if not rows or not {"image", "caption"} <= rows[0].keys():
        raise ImageError(f"{path} needs the columns image and caption, and at least one pair")
    files, captions = [], []
    inside = root.resolve()
    for number, row in enumerate(rows, 2):
        name, caption = row["image"], row["caption"]
        if not name or not caption or len(caption) > _MAX_CAPTION:
            raise ImageError(f"{path}: row {number} needs an image and a caption of at most {_MAX_CAPTION} characters")
        file = inside / name
        try:
            found = file.resolve().is_relative_to(inside) and file.is_file()
        except (OSError, ValueError):  # such as a name that is too long, or one with a NUL
            found = False
        if not found:
            raise ImageError(f"{path}: row {number} names {name[:80]!r}, which is no file below {root}")
        files.append(file)
        captions.append(caption)
    return ImageFolder(root, tuple(files)), tuple(captions)
