"""Messages of a few megabytes that would take seconds to parse: refused by what they hold, before they are parsed."""

import struct
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from guard.protocol.messages import pack_bytes
from guard.protocol.wire import MODEL_CONTROL, REPLY, REQUEST, STREAM_REPLY, Limits, check_message

MANY = 200_000
LIMITS = Limits(elements=1024)


def varint(value: int) -> bytes:
    written = b""
    while value > 127:
        written, value = written + bytes([value & 127 | 128]), value >> 7
    return written + bytes([value])


def holding(number: int, contents: bytes) -> bytes:
    """A field of a number with contents of any length."""
    return varint(number << 3 | 2) + varint(len(contents)) + contents


EMPTY_INPUT, EMPTY_OUTPUT, EMPTY_PARAMETER, EMPTY_RAW = b"\x2a\0", b"\x32\0", b"\x22\0", b"\x3a\0"
FLOODS: dict[str, Callable[[], bytes]] = {
    "inputs": lambda: EMPTY_INPUT * MANY,
    "listed outputs": lambda: EMPTY_OUTPUT * MANY,
    "raw contents": lambda: EMPTY_RAW * MANY,
    "parameters": lambda: EMPTY_PARAMETER * MANY,
    "parameters with names": lambda: b"".join(holding(4, holding(1, b"%d" % n)) for n in range(2000)),
    "parameters of an input": lambda: holding(5, b"\x22\0" * MANY),
    "parameters of an output": lambda: holding(6, b"\x12\0" * MANY),
    "parameters of many inputs": lambda: holding(5, b"\x22\0" * 30) * 100,
    "values of a parameter": lambda: holding(4, b"\x12\0" * MANY),
    "contents": lambda: holding(5, b"\x2a\0" * MANY),
    "typed elements": lambda: holding(5, holding(5, b"\x42\0" * MANY)),
    "typed numbers, not packed": lambda: holding(5, holding(5, b"\x18\1" * MANY)),
    "typed floats, not packed": lambda: holding(5, holding(5, b"\x35\0\0\0\0" * MANY)),
    "typed numbers that grow": lambda: holding(5, holding(5, holding(3, bytes(2**24)))),
    "typed numbers that grow, in parts": lambda: holding(5, holding(5, holding(5, bytes(2**20)) * 20)),
    "packed dimensions": lambda: holding(5, holding(3, b"\1" * MANY)),
    "dimensions": lambda: holding(5, b"\x18\1" * 33),
    "dimensions in long form": lambda: holding(5, holding(3, b"\x81\x80\0" * 33)),
    "unknown numbers": lambda: b"\xf8\1\0" * MANY,
    "unknown texts": lambda: b"\xfa\1\0" * MANY,
    "unknown fixed numbers": lambda: b"\xfd\1\0\0\0\0" * MANY,
    "groups": lambda: b"\x0b" * MANY,
    "inputs in a group": lambda: b"\x0b" + EMPTY_INPUT * MANY + b"\x0c",
    "inputs whose length is in long form": lambda: b"\x2a\x80\0" * MANY,
    "inputs whose tag is in long form": lambda: b"\xaa\x80\0\0" * MANY,
    "a name": lambda: holding(1, b"a" * 140_000),
    "an id": lambda: holding(3, b"a" * 140_000),
    "a name of an input": lambda: holding(5, holding(1, b"a" * 140_000)),
    "a name of a parameter": lambda: holding(4, holding(1, b"a" * 140_000)),
    "a text of a parameter": lambda: holding(4, holding(2, holding(3, b"a" * 140_000))),
    "raw elements": lambda: holding(5, holding(2, b"BYTES")) + holding(7, bytes(4 * MANY)),
    "raw elements before their tensor": lambda: holding(7, bytes(4 * MANY)) + holding(5, holding(2, b"BYTES")),
    "raw elements of the second tensor": lambda: (
        holding(5, b"") + holding(5, holding(2, b"BYTES")) + EMPTY_RAW + holding(7, bytes(4 * MANY))
    ),
    "raw elements with two datatypes": lambda: (
        holding(5, holding(2, b"BYTES") + holding(2, b"FP32")) + holding(7, bytes(4 * MANY))
    ),
}


@pytest.mark.parametrize("name", FLOODS)
def test_what_no_request_needs_is_refused(name: str) -> None:
    with pytest.raises(RequestError):
        check_message(FLOODS[name](), REQUEST, LIMITS)


@pytest.mark.parametrize("name", ["inputs", "parameters", "raw contents", "typed elements"])
def test_so_are_such_replies(name: str) -> None:
    reply = FLOODS[name]().replace(EMPTY_RAW, EMPTY_OUTPUT)
    with pytest.raises(RequestError):
        check_message(reply, REPLY, LIMITS)
    with pytest.raises(RequestError):
        check_message(reply, STREAM_REPLY, LIMITS)
    with pytest.raises(RequestError):
        check_message(holding(2, reply), STREAM_REPLY, LIMITS)


def test_so_are_such_requests_for_a_model() -> None:
    with pytest.raises(RequestError):
        check_message(b"\x1a\0" * MANY, MODEL_CONTROL, LIMITS)


def ordinary() -> list[ModelInferRequest]:
    files = [b"file" * 1000] * 256
    typed = ModelInferRequest(model_name="m", model_version="1", id="7")
    tensor = typed.inputs.add(name="image", datatype="BYTES", shape=[256])
    tensor.contents.bytes_contents.extend(files)
    tensor.parameters["content_type"].string_param = "raw"
    typed.outputs.add(name="logits").parameters["classification"].int64_param = 3
    floats = ModelInferRequest()
    floats.inputs.add(name="image", datatype="FP32", shape=[1, 3, 64, 64]).contents.fp32_contents.extend([0.5] * 12288)
    raw = ModelInferRequest(raw_input_contents=[pack_bytes(files), bytes(10**6)])
    raw.inputs.add(name="image", datatype="BYTES", shape=[256])
    raw.inputs.add(name="mask", datatype="UINT8", shape=[10**6])
    raw.parameters["sequence_id"].int64_param = -1
    numbers = ModelInferRequest()
    numbers.inputs.add(name="ids", datatype="INT64", shape=[-1]).contents.int64_contents.extend(range(-1000, 1000))
    return [typed, floats, raw, numbers, ModelInferRequest()]


@pytest.mark.parametrize("request_", ordinary(), ids=["typed", "floats", "raw", "numbers", "empty"])
def test_ordinary_requests_pass(request_: ModelInferRequest) -> None:
    check_message(request_.SerializeToString(), REQUEST, LIMITS)


def test_ordinary_replies_pass_in_both_dialects() -> None:
    reply = ModelInferResponse(model_name="m" * 200, model_version="v" * 300, id="7")
    reply.outputs.add(name="label", datatype="BYTES", shape=[1000]).contents.bytes_contents.extend([b"cat"] * 1000)
    check_message(reply.SerializeToString(), REPLY, LIMITS)
    check_message(reply.SerializeToString(), STREAM_REPLY, LIMITS)
    envelope = ModelStreamInferResponse(error_message="e" * 60_000, infer_response=reply)
    check_message(envelope.SerializeToString(), STREAM_REPLY, LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"\x2a",
        b"\x2a\x05a",
        b"\xff" * 20,
        b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\1",
        b"\x0d\0",
        b"\x2e",
        b"\x0b" * 500,
    ],
)
def test_what_is_cut_off_is_left_to_the_parser(data: bytes) -> None:
    check_message(data, REQUEST, LIMITS)
    with pytest.raises(DecodeError):
        ModelInferRequest.FromString(data)


def test_a_parser_never_sees_more_than_was_counted() -> None:
    """Messages put together at random from fields: those that are let through hold no more than the limits."""
    few = Limits(tensors=3, parameters=4, elements=5)
    pieces = [
        EMPTY_INPUT, EMPTY_OUTPUT, EMPTY_PARAMETER, EMPTY_RAW, holding(5, b"\x22\0\x22\0"), holding(6, b"\x12\0"),
        holding(5, holding(5, b"\x42\0\x42\0")), b"\xaa\x80\0\0", b"\x2a\x80\0", b"\xf8\1\0", b"\x2a\5", b"\xfb\1",
        b"a",
    ]  # fmt: skip

    @settings(max_examples=400)
    @given(st.lists(st.sampled_from(pieces), max_size=12))
    def look(parts: list[bytes]) -> None:
        data = b"".join(parts)
        try:
            check_message(data, REQUEST, few)
            message = ModelInferRequest.FromString(data)
        except (RequestError, DecodeError):
            return
        assert max(len(message.inputs), len(message.outputs), len(message.raw_input_contents)) <= few.tensors
        of_inputs = sum(len(each.parameters) for each in message.inputs)
        of_outputs = sum(len(each.parameters) for each in message.outputs)
        assert len(message.parameters) + of_inputs + of_outputs <= few.parameters
        assert sum(len(tensor.contents.bytes_contents) for tensor in message.inputs) <= few.elements

    look()


def test_the_elements_of_other_tensors_are_not_counted() -> None:
    raw = struct.pack("<I", 0) * MANY
    check_message(holding(5, holding(2, b"FP32")) + holding(7, raw), REQUEST, LIMITS)
