"""What decoding an image file would cost, read from the file's structure: no pixel is decoded.

A decoder's work is not bounded by the size of a file or of its picture alone: each scan of a progressive JPEG visits
every pixel again, and Pillow walks segments, chunks and junk between them in Python. All of that is counted here, and
limited, before a decoder sees the file.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guard.errors import ImageError

MAX_SCANS = 64
"""The most scans of a JPEG file. Encoders write about 10 for a progressive image, and fewer than 30 in any mode."""
_MAX_SEGMENTS = 4096
"""The most segments of a JPEG file: long colour profiles, depth maps and the like take some hundreds."""
_MAX_JUNK = 4096
"""The most bytes outside of all segments and scans of a JPEG file, which decoders skip one by one."""
_MAX_CHUNKS, _BYTES_PER_CHUNK = 256, 2048
"""The most chunks of a PNG or WebP file: this number, and one more for so many bytes. libpng writes 8,192 in one."""
_MAX_COMPRESSED_TEXTS = 16
"""The most chunks of a PNG file that are decompressed into memory besides the picture."""
_INTERLACED_PASSES = 2
"""Passes of an interlaced PNG file, in pictures: its seven passes visit each pixel once, but in short pieces."""

# Fill bytes, then a marker. FF 00 stands for the value FF in a scan.
_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
# As above, without the restart markers, which belong to a scan.
_MARKER_AFTER_SCAN = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Header:
    """What an image file claims to hold.

    Attributes:
        width: In pixels.
        height: In pixels.
        passes: How often a decoder visits each pixel.
    """

    width: int
    height: int
    passes: int = 1

    @property
    def pixels(self) -> int:
        """Width × height."""
        return self.width * self.height

    @property
    def work(self) -> int:
        """Pixels that a decoder visits."""
        return self.pixels * self.passes


def read_headers(files: Sequence[bytes], *, max_pixels: int, max_work: int) -> tuple[int, dict[int, ImageError]]:
    """Find out what it costs to decode the images of one request.

    Args:
        files: JPEG, PNG or WebP files.
        max_pixels: Largest width × height of one image.
        max_work: The most pixels of all images together; those of a progressive JPEG count once for each scan.

    Returns:
        The pixels of all images together, counted in this way; and why images are not to be decoded, by their numbers:
        those that are none of these formats, have no size, or are beyond a limit.

    Raises:
        ImageError: The images together are beyond the limit.
    """
    total, troubles = 0, {}
    for number, file in enumerate(files):
        try:
            header = read_header(file)
        except ImageError as error:
            troubles[number] = error
            continue
        if header.pixels > max_pixels:
            troubles[number] = ImageError(
                f"the image claims {header.width}×{header.height} pixels, more than the limit of {max_pixels}; send a "
                "smaller one"
            )
            continue
        total += header.work
        if total > max_work:
            raise ImageError(
                f"the images of one request have more than {max_work} pixels, counted once for each scan of a "
                "progressive JPEG; send fewer or smaller ones"
            )
    return total, troubles


def read_header(file: bytes) -> Header:
    """Read size and number of passes of an image file.

    Raises:
        ImageError: The file is no JPEG, PNG or WebP file, has no size, or has more parts than any honest file.
    """
    if file.startswith(b"\xff\xd8\xff"):
        return _jpeg(file)
    if file.startswith(_PNG):
        return _png(file)
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return _webp(file)
    raise ImageError(f"not a readable JPEG, PNG, WEBP image ({len(file)} bytes)")


def _jpeg(file: bytes) -> Header:
    """Walk the markers as libjpeg does: what is no marker is skipped, and the first end of image ends the file."""
    width = height = scans = segments = junk = 0
    position, pattern = 2, _MARKER
    while (found := pattern.search(file, position)) is not None:
        junk += found.start() - position if pattern is _MARKER else 0
        junk += found.end() - found.start() - 2
        segments += 1
        if segments > _MAX_SEGMENTS or junk > _MAX_JUNK:
            raise ImageError("the image is damaged: it has more segments, or more bytes outside of them, than any JPEG")
        marker, position = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            break
        if marker <= 0xBF or 0xD0 <= marker <= _START_OF_IMAGE:
            # Reserved and restart markers have no length; decoders refuse them, or go on behind them.
            continue
        end = position + max(2, int.from_bytes(file[position : position + 2], "big"))
        if marker in _FRAMES:
            height = max(height, int.from_bytes(file[position + 3 : position + 5], "big"))
            width = max(width, int.from_bytes(file[position + 5 : position + 7], "big"))
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise ImageError(f"the JPEG image has more than {MAX_SCANS} scans; store it again with fewer")
        pattern = _MARKER_AFTER_SCAN if marker == _START_OF_SCAN else _MARKER
        position = end
    return _sized("JPEG", width, height, max(1, scans))


def _png(file: bytes) -> Header:
    most, texts, passes = _most_chunks(file), 0, 1
    width = height = 0
    for number, (name, start) in enumerate(_chunks(file, len(_PNG), name_first=False, byteorder="big", beyond=4)):
        texts += name in {b"zTXt", b"iTXt", b"iCCP"}
        if number >= most or texts > _MAX_COMPRESSED_TEXTS:
            raise ImageError("the image is damaged: it has more chunks than any PNG")
        if name == b"IHDR":  # Pillow takes the last one, wherever it is
            width = max(width, int.from_bytes(file[start : start + 4], "big"))
            height = max(height, int.from_bytes(file[start + 4 : start + 8], "big"))
            passes = max(passes, 1 if file[start + 12 : start + 13] == b"\0" else _INTERLACED_PASSES)
        if name == b"IEND":
            break
    return _sized("PNG", width, height, passes)


def _webp(file: bytes) -> Header:
    width = height = 0
    most, end = _most_chunks(file), 8 + int.from_bytes(file[4:8], "little")
    for number, (name, start) in enumerate(_chunks(file, 12, name_first=True, byteorder="little", beyond=0)):
        if start > end:
            break
        if number >= most:
            raise ImageError("the image is damaged: it has more chunks than any WebP")
        size = _webp_size(name, file[start : start + 16])
        width, height = max(width, size[0]), max(height, size[1])
    return _sized("WebP", width, height, 1)


def _webp_size(name: bytes, head: bytes) -> tuple[int, int]:
    """Width and height that the chunk of a WebP file claims; 0 if it claims none."""
    if name == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if name == b"ANMF":
        return 1 + int.from_bytes(head[6:9], "little"), 1 + int.from_bytes(head[9:12], "little")
    if name == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    if name == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return 0, 0


def _chunks(
    file: bytes, position: int, *, name_first: bool, byteorder: str, beyond: int
) -> Iterator[tuple[bytes, int]]:
    """The name and the place of the contents of each chunk, as far as the file goes.

    Args:
        file: The file.
        position: Where the first chunk begins.
        name_first: Whether the name of a chunk precedes its length.
        byteorder: Of the length.
        beyond: Bytes of a chunk behind its contents.
    """
    while position + 8 <= len(file):
        first, second = file[position : position + 4], file[position + 4 : position + 8]
        name, length = (first, second) if name_first else (second, first)
        size = int.from_bytes(length, byteorder)  # type: ignore[arg-type] # `big` or `little`
        yield name, position + 8
        # The contents of a WebP chunk end at an even place.
        position += 8 + size + beyond + (size & 1 if name_first else 0)


def _most_chunks(file: bytes) -> int:
    return _MAX_CHUNKS + len(file) // _BYTES_PER_CHUNK


def _sized(kind: str, width: int, height: int, passes: int) -> Header:
    if not width or not height:
        raise ImageError(f"the image is damaged: the {kind} file has no size")
    return Header(width, height, passes)
