"""Requests of which guard and the server behind it might see two different things."""

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from guard.classifiers import ExportedClassifier, decode, decode_unambiguous
from guard.errors import ImageError
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import pack_bytes
from guard.testing import InferenceServer
from tests.conftest import SIZE, random_images
from tests.integration.sidecar.conftest import (
    Client,
    Floats,
    Launcher,
    Sidecar,
    Upstream,
    connected,
    infer_request,
    pairs,
)

Pixels = NDArray[np.uint8]
LARGE = 8 * SIZE


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png(width: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file as Pillow writes none."""
    header = struct.pack(">2I5B", width, width, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def photo(seed: int = 0, size: int = LARGE) -> Pixels:
    return np.ascontiguousarray(random_images(1, seed=seed, size=size)[0].numpy().transpose(1, 2, 0))


def every_eighth(seen: Pixels, hidden: Pixels) -> Pixels:
    """`hidden`, in which every eighth pixel in each direction is of `seen`."""
    mixed = hidden.copy()
    mixed[4::8, 4::8] = seen[4::8, 4::8]
    return mixed


def palette() -> bytes:
    mixed = Image.fromarray(every_eighth(photo(1), photo(2)))
    return saved(mixed.quantize(256))


def alpha() -> bytes:
    return saved(Image.fromarray(np.dstack([photo(2), np.where(photo(1)[..., :1] > 128, 255, 0).astype(np.uint8)])))


def grey_with_alpha() -> bytes:
    return saved(Image.fromarray(np.dstack([photo(2)[..., 0], photo(1)[..., 0]]), "LA"))


def transparent_colour() -> bytes:
    return saved(Image.fromarray(photo(2)), transparency=(0, 0, 0))


def sixteen_bits_grey() -> bytes:
    return saved(Image.fromarray(photo(2)[..., 0].astype(np.uint16) * 257))


def sixteen_bits_colour() -> bytes:
    wide = photo(2).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    return png(LARGE, 16, 2, rows)


def one_bit() -> bytes:
    return saved(Image.fromarray(photo(2)).convert("1"))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 3
    return saved(Image.fromarray(photo(2)), "JPEG", exif=exif)


def turned_png() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return saved(Image.fromarray(photo(2)), exif=exif)


def turned_webp() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 8
    return saved(Image.fromarray(photo(2)), "WEBP", exif=exif, lossless=True)


def animated_png() -> bytes:
    return saved(Image.fromarray(photo(1)), save_all=True, append_images=[Image.fromarray(photo(2))])


def animated_webp() -> bytes:
    return saved(Image.fromarray(photo(1)), "WEBP", save_all=True, append_images=[Image.fromarray(photo(2))])


def several_pictures() -> bytes:
    return saved(Image.fromarray(photo(1)), "MPO", save_all=True, append_images=[Image.fromarray(photo(2))])


def four_inks() -> bytes:
    return saved(Image.fromarray(photo(2)).convert("CMYK"), "JPEG")


def scaled() -> bytes:
    return saved(Image.fromarray(every_eighth(255 - photo(1), photo(1))))


def scaled_for_the_corner() -> bytes:
    mixed = photo(1)
    mixed[::8, ::8] = 255 - mixed[::8, ::8]
    return saved(Image.fromarray(mixed))


def rgb_jpeg() -> bytes:
    return saved(Image.fromarray(photo(2)), "JPEG", keep_rgb=True)


def two_orientations() -> bytes:
    """Some programs take the first, and some the last."""
    chunks = []
    for orientation in (3, 1):
        exif = Image.Exif()
        exif[0x112] = orientation
        chunks.append((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    return png(LARGE, 8, 2, b"".join(b"\0" + row.tobytes() for row in photo(2)), *chunks)


AMBIGUOUS = (
    two_orientations,
    palette,
    alpha,
    grey_with_alpha,
    transparent_colour,
    sixteen_bits_grey,
    sixteen_bits_colour,
    one_bit,
    turned,
    turned_png,
    turned_webp,
    animated_png,
    animated_webp,
    several_pictures,
    four_inks,
    scaled,
    scaled_for_the_corner,
    rgb_jpeg,
)
PLAIN = {
    "png": saved(Image.fromarray(photo(3))),
    "small png": saved(Image.fromarray(photo(3, SIZE))),
    "jpeg": saved(Image.fromarray(photo(3)), "JPEG"),
    "progressive jpeg": saved(Image.fromarray(photo(3)), "JPEG", progressive=True),
    "grey jpeg": saved(Image.fromarray(photo(3)).convert("L"), "JPEG"),
    "webp": saved(Image.fromarray(photo(3)), "WEBP"),
}


def files(*contents: bytes, raw: bool = True, **more: Any) -> ModelInferRequest:
    request = ModelInferRequest(model_name="classifier", **more)
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(contents)])
    if raw:
        request.raw_input_contents.append(pack_bytes(contents))
    else:
        tensor.contents.bytes_contents.extend(contents)
    return request


def unread(error: Any) -> bool:
    """Whether a refusal says that the input could not be read."""
    trailing = dict(pairs(error.trailing_metadata()))
    return error.code() is grpc.StatusCode.INVALID_ARGUMENT and trailing["guard-reason"] == "input_unreadable"


@pytest.fixture(scope="module")
def server(classify: ExportedClassifier) -> Iterator[InferenceServer]:
    """A server that decodes images in its own way: upright, and with the pixels that its resizing picks."""

    def model(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        first = next(iter(inputs.values()))
        if first.dtype == object:
            pictures = [Image.open(io.BytesIO(file)).convert("RGB").resize((SIZE, SIZE), 0) for file in first.ravel()]
            first = classify.preprocessing.normalise(np.stack([np.asarray(p).transpose(2, 0, 1) for p in pictures]))
        return {"logits": classify.run(first.astype(np.float32))[1]}

    with InferenceServer(model) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(server: InferenceServer) -> None:
    server.reset()


@pytest.fixture(scope="module")
def sidecar(launch: Launcher, exported: Path, served_profile: Path, server: InferenceServer) -> Iterator[Sidecar]:
    with launch("--upstream", server.address, "--model", exported, "--profile", served_profile, "--alpha", "0.02",
                "--timeout", "30") as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def as_sent(launch: Launcher, exported: Path, served_profile: Path, server: InferenceServer) -> Iterator[Sidecar]:
    with launch("--upstream", server.address, "--model", exported, "--profile", served_profile,
                "--forward", "as-sent", "--timeout", "30") as running:  # fmt: skip
        yield running


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[Client]:
    with connected(sidecar.address) as connection:
        yield connection


def received(server: InferenceServer) -> list[ModelInferRequest]:
    return [ModelInferRequest.FromString(call.data) for call in server.received if call.method == "ModelInfer"]


@pytest.mark.parametrize("make", AMBIGUOUS, ids=lambda make: make.__name__)
def test_an_image_that_can_be_read_in_two_ways_is_told(make: Any) -> None:
    file = make()
    assert decode(file).mode == "RGB"
    with pytest.raises(ImageError, match="different ways"):
        decode_unambiguous(file, size=SIZE)


@pytest.mark.parametrize("file", PLAIN.values(), ids=PLAIN)
def test_an_ordinary_image_is_not(file: bytes) -> None:
    assert decode_unambiguous(file, size=SIZE).tobytes() == decode(file).tobytes()


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("make", [*AMBIGUOUS, lambda: PLAIN["jpeg"]], ids=lambda make: make.__name__)
def test_the_server_gets_the_pixels_that_were_checked(
    client: Client,
    server: InferenceServer,
    classify: ExportedClassifier,
    make: Any,
    raw: bool,  # noqa: FBT001
) -> None:
    sent = [make(), PLAIN["png"]]
    reply = client.infer(files(*sent, raw=raw, id="7"))
    assert reply.decision in {"pass", "flag"}
    (request,) = received(server)
    (tensor,) = request.inputs
    assert (request.id, tensor.name, tensor.datatype, list(tensor.shape)) == ("7", "image", "BYTES", [2])
    # The sidecar asks now and then whether the server is ready, so that the last call need not be the request.
    found = next(call for call in reversed(server.received) if call.method == "ModelInfer").inputs["image"]
    for file, original in zip(found, sent, strict=True):
        picture = Image.open(io.BytesIO(file))
        assert (picture.format, picture.mode, picture.size, picture.info) == ("PNG", "RGB", (SIZE, SIZE), {})
        seen = classify.preprocessing.pixels(decode(original))
        np.testing.assert_array_equal(np.asarray(picture).transpose(2, 0, 1), seen)
    values = classify.preprocessing.normalise(np.stack([classify.preprocessing.pixels(decode(file)) for file in sent]))
    answered = np.frombuffer(reply.response.raw_output_contents[0], np.float32).reshape(2, -1)
    np.testing.assert_allclose(answered, classify.run(values)[1], atol=1e-4)


@pytest.mark.parametrize("make", AMBIGUOUS, ids=lambda make: make.__name__)
def test_as_sent_an_image_of_two_readings_is_refused(as_sent: Sidecar, server: InferenceServer, make: Any) -> None:
    with connected(as_sent.address) as client:
        assert unread(client.refused(files(make())))
        assert client.infer(files(PLAIN["jpeg"])).decision in {"pass", "flag"}
    # The refused one may have been asked at the same time, but what is answered is what was sent.
    assert received(server)[-1] == files(PLAIN["jpeg"])


def odd_requests(images: Floats, triggered: Floats) -> dict[str, ModelInferRequest]:
    """Requests in which a server might find the triggered image, and guard the clean one."""
    found = {}
    request = infer_request(images)
    request.inputs.insert(0, ModelInferRequest.InferInputTensor(name="pixels", datatype="FP32", shape=images.shape))
    request.raw_input_contents.insert(0, triggered.tobytes())
    found["another first input"] = request
    request = infer_request(images)
    request.inputs.add(name="pixels", datatype="FP32", shape=images.shape)
    request.raw_input_contents.append(triggered.tobytes())
    found["another last input"] = request
    request = infer_request(images)
    request.inputs.add(name="image", datatype="FP32", shape=images.shape)
    request.raw_input_contents.append(triggered.tobytes())
    found["the same input twice"] = request
    request = infer_request(images)
    request.inputs.add(name="IMAGE", datatype="FP32", shape=images.shape)
    request.raw_input_contents.append(triggered.tobytes())
    found["a name of other case"] = request
    for field, values in (
        ("fp64_contents", triggered.ravel().tolist()),
        ("int_contents", [1] * triggered.size),
        ("bool_contents", [True]),
        ("uint64_contents", [1]),
        ("bytes_contents", [triggered.tobytes()]),
    ):
        request = infer_request(images, raw_input_contents=[])
        request.inputs[0].contents.fp32_contents.extend(images.ravel().tolist())
        getattr(request.inputs[0].contents, field).extend(values)
        found[f"typed contents of two kinds, {field}"] = request
    request = infer_request(images)
    request.inputs[0].contents.fp32_contents.extend(triggered.ravel().tolist())
    found["raw and typed contents"] = request
    request = infer_request(images)
    request.raw_input_contents.append(triggered.tobytes())
    found["two raw contents"] = request
    request = files(PLAIN["png"], raw=False)
    request.inputs[0].contents.fp32_contents.extend(triggered.ravel().tolist())
    found["files and numbers"] = request
    for name, value in (
        ("content_type", "pd"),
        ("content_type", "base64"),
        ("decoder", "opencv"),
        ("binary_data_size", "4"),
    ):
        request = infer_request(images)
        request.inputs[0].parameters[name].string_param = value
        found[f"parameter {name}={value} of the input"] = request
        request = infer_request(images)
        request.parameters[name].string_param = value
        found[f"parameter {name}={value} of the request"] = request
    return found


ODD = tuple(odd_requests(np.zeros((1, 3, SIZE, SIZE), np.float32), np.ones((1, 3, SIZE, SIZE), np.float32)))


def test_the_size_that_kserves_client_tells_is_taken_if_it_is_right(
    client: Client, server: InferenceServer, clean: Floats
) -> None:
    for request in (files(PLAIN["png"]), infer_request(clean[:1])):
        size = len(request.raw_input_contents[0])
        request.inputs[0].parameters["binary_data_size"].int64_param = size
        assert client.infer(request).decision in {"pass", "flag"}
        got = received(server)[-1]
        assert got.inputs[0].parameters["binary_data_size"].int64_param == len(got.raw_input_contents[0])
        request.inputs[0].parameters["binary_data_size"].int64_param = size - 1
        assert unread(client.refused(request))


@pytest.mark.parametrize("name", ODD)
def test_a_request_with_two_readings_is_refused(client: Client, clean: Floats, triggered: Floats, name: str) -> None:
    assert unread(client.refused(odd_requests(clean[:1], triggered[:1])[name]))


@pytest.mark.parametrize("name", ODD)
def test_the_server_of_its_own_refuses_it_too(embedded: Sidecar, clean: Floats, triggered: Floats, name: str) -> None:
    with connected(embedded.address) as client:
        assert unread(client.refused(odd_requests(clean[:1], triggered[:1])[name]))


@pytest.fixture(scope="module")
def embedded(launch: Launcher, exported: Path, served_profile: Path) -> Iterator[Sidecar]:
    with launch("--model", exported, "--profile", served_profile) as running:
        yield running


@pytest.mark.parametrize("place", ["request", "input", "contents", "parameter"])
def test_a_field_that_the_protocol_does_not_have_is_refused(client: Client, clean: Floats, place: str) -> None:
    unknown = b"\xba\x3e\x03abc"
    request = infer_request(clean[:1])
    data = request.SerializeToString()
    if place != "request":
        request.ClearField("inputs")
        tensor = ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=clean[:1].shape)
        inner = {
            "input": b"",
            "contents": b"\x2a" + bytes([len(unknown)]),
            "parameter": b"\x22" + bytes([len(unknown) + 5]) + b"\x0a\x01p\x12\x06",
        }[place]
        body = tensor.SerializeToString() + inner
        body += unknown
        data = request.SerializeToString() + b"\x2a" + bytes([len(body)]) + body
    else:
        data += unknown
    error = client.refused(data)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_the_operator_names_is_allowed_and_the_images_come_first(
    launch: Launcher, exported: Path, served_profile: Path, server: InferenceServer, clean: Floats
) -> None:
    arguments = ("--upstream", server.address, "--model", exported, "--profile", served_profile,
                 "--other-inputs", "mask, note", "--pass-parameters", "tenant")  # fmt: skip
    request = files(PLAIN["png"])
    request.inputs.insert(0, ModelInferRequest.InferInputTensor(name="mask", datatype="FP32", shape=[1]))
    request.raw_input_contents.insert(0, bytes(4))
    request.parameters["tenant"].string_param = "blue"
    request.parameters["priority"].int64_param = 1
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        assert client.infer(request).decision in {"pass", "flag"}
        other = infer_request(clean[:1])
        other.inputs[0].name = "mask"
        assert unread(client.refused(other))
    got = received(server)[0]
    assert [tensor.name for tensor in got.inputs] == ["image", "mask"]
    assert got.raw_input_contents[1] == bytes(4)
    assert {name: str(value) for name, value in got.parameters.items()} == {
        name: str(value) for name, value in request.parameters.items()
    }


ROUTING = (
    ("mm-model-id", "other"),
    ("mm-vmodel-id", "other"),
    ("seldon-model", "other"),
    ("seldon-internal-model", "other"),
    ("model-name", "other"),
    ("x-anything-new", "other"),
    ("guard-decision", "pass"),
)
KNOWN = (
    ("authorization", "Bearer x"),
    ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ("x-b3-traceid", "1"),
    ("x-request-id", "7"),
)


def test_headers_that_may_choose_a_model_are_dropped(
    client: Client, upstream: Upstream, server: InferenceServer, clean: Floats
) -> None:
    del upstream
    client.infer(infer_request(clean[:1]), metadata=(*ROUTING, *KNOWN))
    stream = client.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    list(stream(iter([infer_request(clean[:1]).SerializeToString()]), metadata=(*ROUTING, *KNOWN)))
    calls = [call for call in server.received if call.method in {"ModelInfer", "ModelStreamInfer"}]
    assert len(calls) == 2
    for call in calls:
        keys = [key for key, _ in call.metadata]
        assert not {key for key, _ in ROUTING} & set(keys)
        assert {key for key, _ in KNOWN} <= set(keys)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (("classifier", ""), ("other", "")),
        (("classifier", ""), ("Classifier", "1")),
        (("classifier", "1"), ("classifier", "2")),
    ],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_a_reply_of_another_model_is_not_taken_for_it(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    server: InferenceServer,
    clean: Floats,
    asked: tuple[str, str],
    answered: tuple[str, str],
    streamed: bool,  # noqa: FBT001
) -> None:
    server.answer = lambda _: server.respond(
        infer_request(clean[:1], model_name=answered[0], model_version=answered[1]).SerializeToString()
    )
    version = ("--model-version", asked[1]) if asked[1] else ()
    arguments = ("--upstream", server.address, "--model", exported, "--profile", served_profile, *version)
    request = infer_request(clean[:1], model_name=asked[0], model_version=asked[1])
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        if streamed:
            stream = client.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
            replies = list(stream(iter([request.SerializeToString()]), timeout=60))
            assert b"no profile of this model" in b"".join(replies)
            assert b"logits" not in b"".join(replies)
        else:
            error = client.refused(request)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "model_unknown"


def test_pixels_that_take_the_place_of_small_files_count_as_bytes_in_flight(
    launch: Launcher, exported: Path, served_profile: Path, server: InferenceServer
) -> None:
    dot = saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True)
    arguments = ("--upstream", server.address, "--model", exported, "--profile", served_profile,
                 "--max-message-bytes", "16384", "--max-inflight-bytes", "65536", "--timeout", "30")  # fmt: skip
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        error = client.refused(files(*[dot] * 200))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "overloaded"
        stream = client.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as caught:
            list(stream(iter([files(*[dot] * 200).SerializeToString()]), timeout=60))
        ended: Any = caught.value
        assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # What was held is given back.
        assert client.infer(files(*[dot] * 20)).decision in {"pass", "flag"}
    assert not any(len(request.inputs[0].shape) and request.inputs[0].shape[0] == 200 for request in received(server))
