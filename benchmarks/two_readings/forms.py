"""Requests that carry a clean and a triggered image, so that one reader may see the one and another the other."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import pack_bytes

Pixels = NDArray[np.uint8]
"""An image, shape [S, S, 3]."""
STEP = 8
"""How many times larger than the model's input the images are sent."""
ROUTES = ("mm-model-id", "mm-vmodel-id", "seldon-model", "model-name")


@dataclass(frozen=True)
class Sent:
    """A request as it is sent.

    Attributes:
        messages: One message; several for a stream.
        metadata: Metadata of the call.
        streamed: Whether it is a stream.
    """

    messages: tuple[ModelInferRequest, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    streamed: bool = False


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:  # noqa: ANN401 - whatever Pillow takes
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def large(pixels: Pixels) -> Pixels:
    """The image, every pixel repeated."""
    return np.repeat(np.repeat(pixels, STEP, axis=0), STEP, axis=1)


def mixed(seen: Pixels, hidden: Pixels, phase: int) -> Pixels:
    """`hidden`, in which one pixel of each square is of `seen`."""
    both = large(hidden)
    both[phase::STEP, phase::STEP] = seen
    return both


def wide_png(pixels: Pixels) -> bytes:
    """16 bits per channel, which Pillow cannot write."""
    side = len(pixels)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2") * 257)
    parts = (
        (b"IHDR", struct.pack(">2I5B", side, side, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def turned(pixels: Pixels, orientation: int, kind: str) -> bytes:
    """The image as a file whose metadata say how to turn it; upright it is the image."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    how: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    return saved(Image.fromarray(pixels).transpose(Image.Transpose(back)), kind, exif=exif, **how)


def frames(first: Pixels, last: Pixels, kind: str) -> bytes:
    """A file with two frames."""
    how: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "MPO" else {}
    return saved(Image.fromarray(first), kind, save_all=True, append_images=[Image.fromarray(last)], **how)


def layered(clean: Pixels, triggered: Pixels) -> bytes:
    """An image that is the clean one without its alpha, and near the triggered one on white."""
    alpha = np.full(clean.shape[:2], 255, np.uint8)
    alpha[(triggered.astype(int) > clean).any(axis=2)] = 0
    return saved(Image.fromarray(np.dstack([clean, alpha])))


def files(*contents: bytes, raw: bool = True) -> ModelInferRequest:
    """A request with image files."""
    request = ModelInferRequest()
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(contents)])
    if raw:
        request.raw_input_contents.append(pack_bytes(contents))
    else:
        tensor.contents.bytes_contents.extend(contents)
    return request


def numbers(images: NDArray[np.float32], *, raw: bool = True) -> ModelInferRequest:
    """A request with preprocessed images."""
    request = ModelInferRequest()
    tensor = request.inputs.add(name="image", datatype="FP32", shape=images.shape)
    if raw:
        request.raw_input_contents.append(images.tobytes())
    else:
        tensor.contents.fp32_contents.extend(images.ravel().tolist())
    return request


def _second_input(seen: ModelInferRequest, hidden: ModelInferRequest, place: int, name: str) -> ModelInferRequest:
    request = ModelInferRequest()
    request.CopyFrom(seen)
    extra = ModelInferRequest.InferInputTensor()
    extra.CopyFrom(hidden.inputs[0])
    extra.name = name
    request.inputs.insert(place, extra)
    request.raw_input_contents.insert(place, hidden.raw_input_contents[0])
    return request


def _both_contents(clean: NDArray[np.float32], file: bytes, field: str) -> ModelInferRequest:
    if field == "fp32_contents":
        request = files(file, raw=False)
        request.inputs[0].contents.fp32_contents.extend(clean.ravel().tolist())
        return request
    request = numbers(clean, raw=False)
    getattr(request.inputs[0].contents, field).extend([file] if field == "bytes_contents" else [1, 2, 3])
    return request


def _with_parameter(images: NDArray[np.float32], name: str, value: str, *, of_input: bool) -> ModelInferRequest:
    request = numbers(images)
    (request.inputs[0] if of_input else request).parameters[name].string_param = value
    return request


def _spoilt_batch(clean: NDArray[np.float32], triggered: NDArray[np.float32], value: float) -> ModelInferRequest:
    batch = np.concatenate([triggered, clean, triggered])
    batch[1] = value
    return numbers(batch)


def forms(
    clean: Pixels, triggered: Pixels, normalise: Callable[[Pixels], NDArray[np.float32]]
) -> dict[str, Callable[[], Sent]]:
    """All forms of one pair of images; those that begin with `plain` have one reading.

    Args:
        clean: Shape [S, S, 3].
        triggered: The same image with the trigger.
        normalise: Preprocesses an image to [1, 3, S, S].
    """
    c, t = normalise(clean), normalise(triggered)

    def small(pixels: Pixels) -> bytes:
        return saved(Image.fromarray(pixels))

    def big(pixels: Pixels) -> bytes:
        return small(large(pixels))

    image_files: dict[str, Callable[[], bytes]] = {
        "plain PNG": lambda: big(triggered),
        "plain PNG of the model's size": lambda: small(triggered),
        "plain JPEG": lambda: saved(Image.fromarray(large(triggered)), "JPEG", quality=98),
        "plain WebP": lambda: saved(Image.fromarray(large(triggered)), "WEBP", lossless=True),
        "palette": lambda: saved(Image.fromarray(mixed(clean, triggered, 4)).quantize(256)),
        "palette, corner": lambda: saved(Image.fromarray(mixed(clean, triggered, 0)).quantize(256)),
        "palette, the other way": lambda: saved(Image.fromarray(mixed(triggered, clean, 4)).quantize(256)),
        "picked pixels": lambda: saved(Image.fromarray(mixed(clean, triggered, 4))),
        "picked pixels, corner": lambda: saved(Image.fromarray(mixed(clean, triggered, 0))),
        "picked pixels, the other way": lambda: saved(Image.fromarray(mixed(triggered, clean, 4))),
        "picked corners, the other way": lambda: saved(Image.fromarray(mixed(triggered, clean, 0))),
        "picked pixels in a JPEG": lambda: saved(Image.fromarray(mixed(triggered, clean, 4)), "JPEG", quality=100),
        "alpha over the trigger": lambda: layered(large(clean), large(triggered)),
        "alpha under the trigger": lambda: layered(large(triggered), large(clean)),
        "alpha, everything transparent": lambda: saved(
            Image.fromarray(np.dstack([large(triggered), np.zeros(large(triggered).shape[:2], np.uint8)]))
        ),
        "a transparent colour": lambda: saved(Image.fromarray(large(triggered)), transparency=(0, 0, 0)),
        "16 bits": lambda: wide_png(large(triggered)),
        "16 bits grey": lambda: saved(Image.fromarray(large(triggered)[..., 0].astype(np.uint16) * 257)),
        "CMYK": lambda: saved(Image.fromarray(large(triggered)).convert("CMYK"), "JPEG", quality=98),
        "RGB in a JPEG": lambda: saved(Image.fromarray(large(triggered)), "JPEG", quality=98, keep_rgb=True),
        **{
            f"orientation {number} of a {kind}": partial(turned, large(triggered), number, kind)
            for kind in ("JPEG", "PNG", "WEBP")
            for number in range(2, 9)
        },
        **{
            f"{which} frame of a {kind}": partial(frames, large(first), large(last), kind)
            for kind in ("PNG", "WEBP", "MPO")
            for which, first, last in (("first", triggered, clean), ("last", clean, triggered))
        },
    }
    requests: dict[str, Callable[[], ModelInferRequest]] = {
        **{name: partial(_of_file, make) for name, make in image_files.items()},
        "plain PNG, typed": lambda: files(big(triggered), raw=False),
        "plain FP32": lambda: numbers(t),
        "plain FP32, typed": lambda: numbers(t, raw=False),
        "another first input": lambda: _second_input(numbers(c), numbers(t), 0, "pixels"),
        "another last input": lambda: _second_input(numbers(c), numbers(t), 1, "pixels"),
        "another first input of files": lambda: _second_input(numbers(c), files(big(triggered)), 0, "pixels"),
        "the same name twice": lambda: _second_input(numbers(c), numbers(t), 0, "image"),
        "another case": lambda: _second_input(numbers(c), numbers(t), 0, "Image"),
        "files beside numbers": lambda: _both_contents(c, big(triggered), "bytes_contents"),
        "numbers beside files": lambda: _both_contents(t, big(clean), "fp32_contents"),
        **{
            f"parameter {name} of {whose}": partial(_with_parameter, t, name, value, of_input=whose == "an input")
            for name, value in (("content_type", "pd"), ("dtype", "uint8"), ("decoder", "other"))
            for whose in ("an input", "the request")
        },
        **{f"a batch with {value}": partial(_spoilt_batch, c, t, value) for value in (np.nan, np.inf, 3e38)},
        "a batch with a broken file": lambda: files(big(triggered), big(clean)[:60], big(triggered)),
    }
    found = {name: partial(_sent, make) for name, make in requests.items()}
    for key in ROUTES:
        found[f"header {key}"] = partial(_sent, requests["plain FP32"], metadata=((key, "pillow"),))
    for name in ("plain PNG", "palette", "another first input", "files beside numbers"):
        found[f"{name}, in a stream"] = partial(_sent, requests[name], streamed=True)
    found["plain FP32, second in a stream"] = partial(_sent, partial(numbers, c), requests["plain FP32"], streamed=True)
    for name in ("palette", "picked pixels, corner"):
        other = partial(_of_model, partial(numbers, c), "corner")
        found[f"{name}, after another model in a stream"] = partial(_sent, other, requests[name], streamed=True)
    return dict(found)


def _of_file(make: Callable[[], bytes]) -> ModelInferRequest:
    return files(make())


def _of_model(make: Callable[[], ModelInferRequest], name: str) -> ModelInferRequest:
    request = make()
    request.model_name = name
    return request


def _sent(
    *makes: Callable[[], ModelInferRequest], metadata: tuple[tuple[str, str], ...] = (), streamed: bool = False
) -> Sent:
    return Sent(tuple(make() for make in makes), metadata, streamed)
