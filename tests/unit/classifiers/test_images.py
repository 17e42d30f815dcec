import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guard.classifiers import ImageFolder, Preprocessing, decode
from guard.errors import ImageError

HALF = Preprocessing(8, (0.5,) * 3, (0.5,) * 3)


def encoded(kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 30)).save(buffer, kind)
    return buffer.getvalue()


def png_bomb(side: int = 60_000) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + encoded()[33:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_decoded(kind: str) -> None:
    assert decode(encoded(kind)).size == (12, 10)


def test_a_bomb_is_refused_by_its_header() -> None:
    for side in (60_000, 8_000):
        with pytest.raises(ImageError, match="limit of 50000000"):
            decode(png_bomb(side))


def test_the_limit_on_pixels_is_the_callers() -> None:
    with pytest.raises(ImageError, match="limit of 100"):
        decode(encoded(), max_pixels=100)


@pytest.mark.parametrize("data", [b"", b"hello", encoded("JPEG")[:-40], encoded()[:40], encoded("GIF")])
def test_damaged_or_foreign_files_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 200))
def test_no_bytes_raise_anything_else(noise: bytes, kind: str, position: int) -> None:
    data = encoded(kind)
    for attempt in (noise, data[:position] + noise + data[position + len(noise) :]):
        with contextlib.suppress(ImageError):
            decode(attempt)


def test_a_damaged_file_among_good_ones_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"b\.png"):
        ImageFolder.scan(tmp_path).pixels(HALF)


def test_a_strip_that_would_grow_when_it_is_resized_is_refused_and_named(tmp_path: Path) -> None:
    Image.new("L", (1, 1_000_000)).save(tmp_path / "strip.png")
    with pytest.raises(ImageError, match=r"strip\.png: the image is too narrow \(1×1000000\)"):
        ImageFolder.scan(tmp_path).pixels(Preprocessing(32, (0.5,) * 3, (0.5,) * 3))


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="contains no image"):
        ImageFolder.scan(tmp_path)
    with pytest.raises(ImageError, match="no folder"):
        ImageFolder.scan(tmp_path / "nowhere")


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    for name in ("dog", "cat", "cat/deeper"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "x.png").write_bytes(encoded())
    folder = ImageFolder.scan(tmp_path)
    assert folder.classes() == ("cat", "dog")
    assert folder.labels(folder.classes()) == (0, 0, 1)
    assert folder.pixels(HALF).shape == (3, 3, 8, 8)


def test_an_image_outside_any_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded())
    with pytest.raises(ImageError, match="outside any class"):
        ImageFolder.scan(tmp_path).classes()


def test_a_sample_is_reproducible_and_not_larger(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index}.png").write_bytes(encoded())
    folder = ImageFolder.scan(tmp_path)
    assert folder.sample(10, seed=1) == folder.sample(10, seed=1) != folder.sample(10, seed=2)
    assert len(folder.sample(10, seed=1)) == 10
    assert folder.sample(99, seed=1) == folder


def test_pixels_are_bytes_before_normalisation(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded())
    pixels = ImageFolder.scan(tmp_path).pixels(HALF)
    assert pixels.dtype == np.uint8
    assert pixels[0, :, 0, 0].tolist() == [200, 10, 30]
