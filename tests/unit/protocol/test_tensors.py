import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.protocol.inference_pb2 import InferTensorContents, ModelInferRequest, ModelInferResponse
from guard.protocol.messages import pack_bytes, parse_request, remove_output
from guard.protocol.tensors import (
    add_output,
    encoded_inputs,
    find_input,
    float_images,
    float_output,
    raw_contents,
    unpack_bytes,
)

SHAPE = (3, 2, 2)
IMAGES: NDArray[np.float32] = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, *SHAPE)


def tensor(
    datatype: str = "FP32", shape: tuple[int, ...] = (2, *SHAPE), **contents: list[float] | list[bytes]
) -> ModelInferRequest.InferInputTensor:
    made = ModelInferRequest.InferInputTensor(name="image", datatype=datatype, shape=shape)
    for name, values in contents.items():
        getattr(made.contents, name).extend(values)
    return made


def request(*names: str, raw: list[bytes] | None = None) -> ModelInferRequest:
    inputs = [ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=[1]) for name in names]
    return ModelInferRequest(model_name="m", inputs=inputs, raw_input_contents=raw or [])


def test_raw_floats_arrive_as_they_were_sent() -> None:
    np.testing.assert_array_equal(float_images(tensor(), IMAGES.tobytes(), SHAPE, 2), IMAGES)


def test_typed_floats_arrive_as_they_were_sent() -> None:
    sent = tensor(fp32_contents=IMAGES.ravel().tolist())
    received = float_images(sent, None, SHAPE, 2)
    assert received.dtype == np.float32
    np.testing.assert_array_equal(received, IMAGES)


@pytest.mark.parametrize("datatype", ["FP16", "FP64", "UINT8", "BYTES", "", "x" * 10_000])
def test_another_datatype_is_refused(datatype: str) -> None:
    with pytest.raises(RequestError, match="FP32 images or BYTES files are expected") as caught:
        float_images(tensor(datatype), IMAGES.tobytes(), SHAPE, 2)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (2,),
        SHAPE,
        (0, *SHAPE),
        (-1, *SHAPE),
        (2, -3, -2, 2),
        (2, 3, 2, 3),
        (2, 2, 3, 2),
        (2, *SHAPE, 1),
        (1, 2, *SHAPE),
        (2**62, *SHAPE),
        (1,) * 1000,
    ],
)
def test_another_shape_is_refused_and_the_expected_one_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"\[N, 3, 2, 2\] is expected, N from 1 to 2") as caught:
        float_images(tensor(shape=shape), IMAGES.tobytes(), SHAPE, 2)
    assert len(str(caught.value)) < 250


def test_a_batch_above_the_limit_is_refused_and_one_at_it_is_not() -> None:
    assert len(float_images(tensor(), IMAGES.tobytes(), SHAPE, 2)) == 2
    with pytest.raises(RequestError, match="N from 1 to 1"):
        float_images(tensor(), IMAGES.tobytes(), SHAPE, 1)


@pytest.mark.parametrize("length", [0, 1, 95, 97, 192])
def test_raw_floats_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(RequestError, match=f"has {length} bytes; its shape needs 96"):
        float_images(tensor(), bytes(length), SHAPE, 2)


@pytest.mark.parametrize("count", [0, 23, 25])
def test_typed_floats_of_another_length_are_refused(count: int) -> None:
    with pytest.raises(RequestError, match=f"has {count} values; its shape needs 24"):
        float_images(tensor(fp32_contents=[0.0] * count), None, SHAPE, 2)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_files_arrive_as_they_were_sent_raw_or_typed(shape: tuple[int, ...]) -> None:
    files = [b"one", b"", b"\x00" * 300]
    assert encoded_inputs(tensor("BYTES", shape), pack_bytes(files), 3) == files
    assert encoded_inputs(tensor("BYTES", shape, bytes_contents=files), None, 3) == files


@pytest.mark.parametrize("shape", [(), (0,), (-1,), (4,), (3, 2), (3, 1, 1), (3, -1), (2**62,)])
def test_files_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"\[N\] is expected for BYTES, N from 1 to 3"):
        encoded_inputs(tensor("BYTES", shape), pack_bytes([b"a"] * 3), 3)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_files_than_the_shape_says_is_refused(count: int) -> None:
    with pytest.raises(RequestError, match=f"has {count} elements; its shape needs 2"):
        encoded_inputs(tensor("BYTES", (2,)), pack_bytes([b"a"] * count), 3)
    with pytest.raises(RequestError, match=f"has {count} elements; its shape needs 2"):
        encoded_inputs(tensor("BYTES", (2,), bytes_contents=[b"a"] * count), None, 3)


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_packing_and_unpacking_are_inverse(elements: list[bytes]) -> None:
    assert unpack_bytes(pack_bytes(elements)) == elements


@pytest.mark.parametrize(
    "raw",
    [
        b"\x01",
        b"\x00\x00\x00",
        struct.pack("<I", 1),
        struct.pack("<I", 5) + b"four",
        struct.pack("<I", 2**32 - 1) + b"x",
        pack_bytes([b"good"]) + b"\x01\x00",
        pack_bytes([b"good"]) + struct.pack("<I", 9) + b"short",
    ],
)
def test_damaged_lengths_are_refused(raw: bytes) -> None:
    with pytest.raises(RequestError, match="damaged"):
        unpack_bytes(raw)


def test_the_input_is_found_by_name_with_its_own_raw_contents() -> None:
    asked = request("other", "image", raw=[b"first", b"second"])
    index = find_input(asked, "image", others={"other"})
    assert (asked.inputs[index].name, raw_contents(asked, index)) == ("image", b"second")


def test_an_only_input_may_have_any_name() -> None:
    asked = request("pixels")
    assert find_input(asked, "image") == 0
    assert raw_contents(asked, 0) is None


def test_a_missing_input_is_refused_and_the_present_ones_named() -> None:
    with pytest.raises(RequestError, match=r"no input 'image'; the request has \['a', 'b'\]"):
        find_input(request("a", "b"), "image")
    with pytest.raises(RequestError, match="no input 'image'"):
        find_input(request(), "image")


def test_two_inputs_of_the_same_name_are_refused() -> None:
    with pytest.raises(RequestError, match="more than once"):
        find_input(request("image", "image"), "image")


def test_shared_memory_is_refused() -> None:
    asked = request("image")
    asked.inputs[0].parameters["shared_memory_region"].string_param = "region"
    with pytest.raises(RequestError, match="shared memory"):
        find_input(asked, "image")


def test_raw_and_typed_contents_together_are_refused() -> None:
    asked = request("image", raw=[b"1234"])
    asked.inputs[0].contents.fp32_contents.append(1)
    with pytest.raises(RequestError, match="both raw and typed"):
        find_input(asked, "image")


@pytest.mark.parametrize("raw", [1, 3])
def test_raw_contents_that_do_not_match_the_inputs_are_refused(raw: int) -> None:
    with pytest.raises(RequestError, match=f"{raw} raw contents for 2 inputs"):
        find_input(request("image", "other", raw=[b""] * raw), "image")


def test_bytes_that_are_no_request_are_refused() -> None:
    with pytest.raises(RequestError, match="not a ModelInferRequest"):
        parse_request(b"\xff\xff\xff")


def read_everything(data: bytes) -> None:
    asked = parse_request(data)
    index = find_input(asked, "image", others={"other"})
    found, raw = asked.inputs[index], raw_contents(asked, index)
    for read in (
        lambda: float_images(found, raw, SHAPE, 4),
        lambda: encoded_inputs(found, raw, 4),
        lambda: unpack_bytes(raw or b""),
    ):
        try:
            read()
        except RequestError as error:
            assert str(error)  # noqa: PT017 - which of the three refuse is not the point


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_arbitrary_bytes_raise_request_errors_only(data: bytes) -> None:
    try:
        read_everything(data)
    except RequestError as error:
        assert str(error)  # noqa: PT017
    try:
        unpack_bytes(data)
    except RequestError as error:
        assert str(error)  # noqa: PT017


CONTENTS = st.builds(
    InferTensorContents,
    fp32_contents=st.lists(st.floats(width=32), max_size=13),
    bytes_contents=st.lists(st.binary(max_size=8), max_size=4),
)
INPUTS = st.builds(
    ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["image", "other", ""]),
    datatype=st.sampled_from(["FP32", "BYTES", "INT8", ""]),
    shape=st.lists(st.one_of(st.integers(0, 4), st.integers(-(2**63), 2**63 - 1)), max_size=5)
    | st.sampled_from([(1, *SHAPE), (2,), (1, 1)]),
    contents=st.none() | CONTENTS,
)


@given(
    st.lists(INPUTS, max_size=3),
    st.lists(st.binary(max_size=100) | st.just(bytes(48)), max_size=3),
    st.integers(0, 400),
    st.integers(0, 255),
)
@settings(max_examples=300)
def test_arbitrary_and_damaged_requests_raise_request_errors_only(
    inputs: list[ModelInferRequest.InferInputTensor], raw: list[bytes], at: int, byte: int
) -> None:
    data = ModelInferRequest(model_name="m", inputs=inputs, raw_input_contents=raw).SerializeToString()
    damaged = bytearray(data)
    damaged[at % len(damaged)] = byte
    for sent in (data, bytes(damaged)):
        try:
            read_everything(sent)
        except RequestError as error:
            assert str(error)  # noqa: PT017


@pytest.mark.parametrize("raw", [True, False])
def test_outputs_are_read_back_as_they_were_written(raw: bool) -> None:  # noqa: FBT001
    response = ModelInferResponse()
    add_output(response, "label", [b"cat", b"dog"], raw=raw)
    add_output(response, "embedding", IMAGES, raw=raw)
    read = float_output(response, "embedding")
    assert read is not None
    np.testing.assert_array_equal(read, IMAGES)
    assert (list(response.outputs[0].shape), response.outputs[0].datatype) == ([2], "BYTES")
    assert len(response.raw_output_contents) == (2 if raw else 0)
    assert response.outputs[1].HasField("contents") is not raw


@pytest.mark.parametrize("raw", [True, False])
def test_an_output_is_removed_with_its_contents_and_the_others_stay(raw: bool) -> None:  # noqa: FBT001
    response, expected = ModelInferResponse(id="7"), ModelInferResponse(id="7")
    for name, values in (("a", IMAGES), ("embedding", IMAGES[:1]), ("b", IMAGES[1:])):
        add_output(response, name, values, raw=raw)
        if name != "embedding":
            add_output(expected, name, values, raw=raw)
    remove_output(response, "embedding")
    assert response == expected
    remove_output(response, "embedding")
    assert response == expected


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "typed"),
    [
        ("FP64", [2], bytes(8), []),
        ("BYTES", [2], bytes(8), []),
        ("FP32", [2], bytes(7), []),
        ("FP32", [2], None, [1.0]),
        ("FP32", [2], None, []),
        ("FP32", [0], None, []),
        ("FP32", [-2], bytes(8), []),
        ("FP32", [-1, -2], bytes(8), []),
        ("FP32", [-1, -2], None, [1.0, 2.0]),
        ("FP32", [], bytes(4), []),
        ("FP32", [], None, [1.0]),
        ("FP32", [2**62, 2**62], None, []),
    ],
)
def test_an_output_that_is_not_well_formed_reads_as_none(
    datatype: str, shape: list[int], raw: bytes | None, typed: list[float]
) -> None:
    response = ModelInferResponse(raw_output_contents=[] if raw is None else [raw])
    output = response.outputs.add(name="embedding", datatype=datatype, shape=shape)
    output.contents.fp32_contents.extend(typed)
    assert float_output(response, "embedding") is None


def test_an_output_without_raw_contents_of_its_own_reads_as_none() -> None:
    response = ModelInferResponse(raw_output_contents=[bytes(8)])
    for name in ("a", "embedding"):
        response.outputs.add(name=name, datatype="FP32", shape=[2])
    assert float_output(response, "embedding") is None
    assert float_output(response, "missing") is None
