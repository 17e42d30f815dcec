from typing import Any

import numpy as np
import pytest

from guard.classifiers.text_exporting import text_input
from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import parse_request
from guard.protocol.tensors import encoded_inputs
from guard.sidecar import Settings
from guard.sidecar.decisions.inputs import LARGE_PIXELS
from guard.sidecar.decisions.texts import MAX_REQUEST_TEXT, TextReader
from guard.sidecar.decisions.workers import LargeWorkError
from tests.texts import base


@pytest.fixture(scope="module")
def reader() -> TextReader:
    settings = Settings.load(None, profile="p", model="m", input_tensor="text", max_batch=8)
    return TextReader(text_input(base()), settings.served[0], settings)


def request(texts: list[bytes]) -> ModelInferRequest:
    message = ModelInferRequest(model_name="classifier")
    message.inputs.add(name="text", datatype="BYTES", shape=[len(texts)]).contents.bytes_contents.extend(texts)
    return message


def of_ids(rows: list[list[int]], datatype: str = "INT64") -> ModelInferRequest:
    message = ModelInferRequest(model_name="classifier")
    tensor = message.inputs.add(name="input_ids", datatype=datatype, shape=[len(rows), len(rows[0])])
    field = tensor.contents.int64_contents if datatype == "INT64" else tensor.contents.int_contents
    field.extend(number for row in rows for number in row)
    return message


def read(reader: TextReader, message: ModelInferRequest, **how: Any) -> Any:
    how = {"replaced": False, "ambiguous": True, **how}
    return reader.read(message, reader.claims(message), **how)


def test_texts_are_read_as_the_model_reads_them(reader: TextReader) -> None:
    texts = ["A photo of a dog.", "two cats &amp; a bird"]
    found = read(reader, request([text.encode() for text in texts]))
    assert found.values.tolist() == base().tokenizer(texts).tolist()
    assert (found.rows.tolist(), found.count, found.trouble) == ([0, 1], 2, "")


@pytest.mark.parametrize("datatype", ["INT64", "INT32"])
def test_ids_are_read_as_they_are_and_padded(reader: TextReader, datatype: str) -> None:
    ids = base().tokenizer(["a photo of a dog"])[0, :7].tolist()
    found = read(reader, of_ids([ids, ids], datatype))
    assert found.values.tolist() == [[*ids, *[0] * 17]] * 2
    assert found.canonical is None


@pytest.mark.parametrize("spoil", [{0: 5}, {6: 0}, {2: -1}, {2: 49408}])
def test_ids_that_are_not_of_one_text_are_not_read(reader: TextReader, spoil: dict[int, int]) -> None:
    ids = base().tokenizer(["a photo of a dog"])[0, :7].tolist()
    spoiled = [spoil.get(place, number) for place, number in enumerate(ids)]
    found = read(reader, of_ids([spoiled, ids]))
    assert found.rows.tolist() == [1]
    assert "text 0 of the batch" in found.trouble


@pytest.mark.parametrize(
    "message",
    [
        of_ids([[49406] * 25]),
        of_ids([[49407]]),
        of_ids([[49406, 49407]] * 9),
        ModelInferRequest(inputs=[{"name": "text", "datatype": "FP32", "shape": [1, 2]}]),
        request([b"a"] * 9),
    ],
)
def test_tensors_that_hold_no_texts_are_refused(reader: TextReader, message: ModelInferRequest) -> None:
    with pytest.raises(RequestError):
        read(reader, message)


def test_each_text_is_read_by_itself(reader: TextReader) -> None:
    found = read(reader, request([b"a dog", b"\xff\xfe", b"z" * 9000, b"z" * 40_000]))
    assert found.rows.tolist() == [0]
    assert "text 1 of the batch: it is not valid UTF-8" in found.trouble


def test_what_is_forwarded_is_the_text_of_the_tokens(reader: TextReader) -> None:
    message = request([b"A Dog &amp; a  CAT", b"don't", b"word " * 40, b"a <end_of_text> dog"])
    found = read(reader, message, replaced=True)
    assert found.rows.tolist() == [0, 1]
    assert "text 2 of the batch: it has more than 24 tokens" in found.trouble
    forwarded = parse_request(found.canonical)
    sent = encoded_inputs(forwarded.inputs[0], None, 8)
    assert sent[:2] == [b"a dog & a cat", b"don 't"]
    again = read(reader, forwarded)
    assert np.array_equal(again.values[:2], found.values)


def test_what_is_forwarded_as_it_is_has_one_reading(reader: TextReader) -> None:
    message = request([b"A  dog", b"a &lt;b&gt;", "“a” dog".encode(), b"word " * 40])
    found = read(reader, message, ambiguous=False)
    assert found.rows.tolist() == [0]
    assert "clean in different ways" in found.trouble


def test_much_text_waits_for_a_thread_for_large_work_and_too_much_is_refused(reader: TextReader) -> None:
    assert reader.claims(request([b"a dog"])).work < LARGE_PIXELS
    claims = reader.claims(request([b"z" * 8000] * 8))
    with pytest.raises(LargeWorkError):
        claims.in_turn(lambda: None)
    with pytest.raises(RequestError, match="at most"):
        reader.claims(request([b"z" * (MAX_REQUEST_TEXT // 8 + 1)] * 8))
