"""Image files that are cheap to send and dear to decode: refused by their structure, before a decoder sees them."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guard.classifiers import decode
from guard.classifiers.headers import MAX_SCANS, read_header, read_headers
from guard.errors import ImageError
from tests.damage import FILES

LIMITS = {"max_pixels": 50_000_000, "max_work": 500_000_000}


def jpeg(width: int = 64, height: int = 48, **options: Any) -> bytes:
    buffer = io.BytesIO()
    values = np.add.outer(np.arange(height), np.arange(width)) % 251
    Image.fromarray(values.astype(np.uint8)).convert("RGB").save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_scans(file: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    last, end = file.rindex(b"\xff\xda"), file.rindex(b"\xff\xd9")
    return file[:end] + file[last:end] * count + file[end:]


def chunk(name: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", zlib.crc32(name + contents))


def png(*chunks: bytes, **options: Any) -> bytes:
    """A PNG with more chunks after its header."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10)).save(buffer, "PNG", **options)
    file = buffer.getvalue()
    return file[:33] + b"".join(chunks) + file[33:]


def webp(*chunks: bytes) -> bytes:
    contents = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(contents)) + contents


def webp_chunk(name: bytes, contents: bytes) -> bytes:
    return name + struct.pack("<I", len(contents)) + contents + b"\0" * (len(contents) & 1)


PROGRESSIVE = jpeg(progressive=True)
FLOODS: dict[str, Callable[[], bytes]] = {
    "hundreds of scans": lambda: with_scans(PROGRESSIVE, 300),
    "scans behind fill bytes": lambda: with_scans(PROGRESSIVE, 300).replace(b"\xff\xda", b"\xff\xff\xff\xda"),
    "scans behind a second frame": lambda: with_scans(PROGRESSIVE, 300).replace(b"\xff\xc2", b"\xff\xe9", 1),
    "scans of a baseline file": lambda: with_scans(jpeg(), 300),
    "scans with restart markers": lambda: with_scans(jpeg(progressive=True, restart_marker_blocks=1), 300),
    "a million empty segments": lambda: b"\xff\xd8" + b"\xff\xfe\x00\x02" * 1_000_000 + jpeg()[2:],
    "a million bytes of junk": lambda: b"\xff\xd8\xff\xfe\x00\x02" + bytes(1_000_000) + jpeg()[2:],
    "a million fill bytes": lambda: b"\xff\xd8" + b"\xff" * 1_000_000 + jpeg()[2:],
    "a million escaped fill bytes": lambda: b"\xff\xd8\xff\xfe\x00\x02" + b"\xff\x00" * 500_000 + jpeg()[2:],
    "a hundred thousand chunks": lambda: png(chunk(b"abCd", b"") * 100_000),
    "a hundred empty data chunks too many": lambda: png(chunk(b"IDAT", b"") * 1000),
    "compressed texts": lambda: png(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 65),
    "compressed profiles": lambda: png(*[chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6)))] * 65),
    "international texts": lambda: png(*[chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(10**6)))] * 65),
    "a hundred thousand frames": lambda: webp(webp_chunk(b"ANMF", bytes(16)) * 100_000),
}


@pytest.mark.parametrize("name", FLOODS)
def test_what_no_honest_file_has_is_refused(name: str) -> None:
    with pytest.raises(ImageError):
        read_header(FLOODS[name]())


def test_scans_are_counted_as_a_decoder_sees_them() -> None:
    # The thumbnail has scans of its own, which nobody decodes; nor what follows the end of the image.
    exif = Image.Exif()
    exif[0x9286] = with_scans(PROGRESSIVE, 20)[:60_000]
    own = read_header(PROGRESSIVE).passes
    assert own == PROGRESSIVE.count(b"\xff\xda") == 10
    assert read_header(jpeg(progressive=True, exif=exif)).passes == own
    assert read_header(PROGRESSIVE + with_scans(PROGRESSIVE, 200)).passes == own
    assert read_header(with_scans(PROGRESSIVE, MAX_SCANS - own)).passes == MAX_SCANS
    with pytest.raises(ImageError, match=f"more than {MAX_SCANS} scans"):
        read_header(with_scans(PROGRESSIVE, MAX_SCANS - own + 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (300, 200), (1, 5000)])
def test_the_size_is_that_of_the_decoder(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    several: tuple[dict[str, Any], ...] = ({}, {"progressive": True}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*"})
    for index, options in enumerate(several):
        Image.new("RGB", size).save(tmp_path / str(index), kind, **options)
        header = read_header((tmp_path / str(index)).read_bytes())
        assert (header.width, header.height) == size


def test_the_size_of_an_animation_is_that_of_its_canvas(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), (shade, 0, 0)) for shade in (0, 90, 180)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    header = read_header((tmp_path / "a.webp").read_bytes())
    assert (header.width, header.height) == (40, 30)


def test_interlaced_files_cost_more() -> None:
    header = struct.pack(">IIBBBBB", 1000, 1000, 8, 2, 0, 0, 1)
    assert read_header(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)).work == 2_000_000


def test_an_ordinary_camera_picture_passes() -> None:
    # 12 megapixels in ten scans; four of them in one request.
    picture = jpeg(4000, 3000, progressive=True, quality=30)
    assert read_header(picture).work == 120_000_000
    assert read_headers([picture] * 4, **LIMITS) == (480_000_000, {})
    with pytest.raises(ImageError, match="images of one request have more than 500000000 pixels"):
        read_headers([picture] * 5, **LIMITS)


def test_pixels_are_bounded_for_each_image_and_in_sum() -> None:
    header = struct.pack(">IIBBBBB", 7000, 7000, 8, 2, 0, 0, 0)
    large = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    with pytest.raises(ImageError, match="more than 500000000 pixels"):
        read_headers([large] * 32, **LIMITS)
    work, troubles = read_headers([large, b"hello"], **LIMITS)
    assert (work, set(troubles)) == (49_000_000, {1})
    assert "not a readable" in str(troubles[1])
    _, troubles = read_headers([large], max_pixels=1000, max_work=10**9)
    assert "7000×7000 pixels, more than the limit of 1000" in str(troubles[0])


@pytest.mark.parametrize(
    "file", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff\xd9"]
)
def test_a_file_without_a_size_is_refused(file: bytes) -> None:
    with pytest.raises(ImageError):
        read_header(file)


def test_nothing_that_a_decoder_takes_is_larger_than_its_header_says() -> None:
    generator = np.random.default_rng(0)
    for file in [*FILES, PROGRESSIVE] * 150:
        changed = bytearray(file)
        for place in generator.integers(0, min(len(file), 700), 2):
            changed[place] = generator.integers(256)
        try:
            image = decode(bytes(changed))
        except Exception:  # noqa: BLE001, S112 - whatever is refused is not served
            continue
        try:
            header = read_header(bytes(changed))
        except ImageError as error:
            assert re.search("damaged|scans", str(error))  # noqa: PT017
            continue
        assert header.pixels >= image.width * image.height
