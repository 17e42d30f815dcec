import pytest

from guard.protocol.dialects import FINAL, Dialect, StreamDialect, error_reply
from guard.protocol.inference_pb2 import ModelInferResponse, ModelStreamInferResponse

PLAIN = ModelInferResponse(model_name="m", model_version="1", id="7")
PLAIN.outputs.add(name="logits", datatype="FP32", shape=[1])
PLAIN.raw_output_contents.append(b"\xff\xfe\x00\x01")
NAMELESS = ModelInferResponse()
NAMELESS.outputs.add(name="logits")
LAST = ModelInferResponse(model_name="m")
LAST.parameters[FINAL].bool_param = True


def enveloped(response: ModelInferResponse) -> bytes:
    return ModelStreamInferResponse(infer_response=response).SerializeToString()


async def nobody() -> str:
    return ""


def stream(setting: str = "auto") -> StreamDialect:
    return StreamDialect(setting, nobody)


@pytest.mark.parametrize("response", [PLAIN, NAMELESS, LAST], ids=["whole", "nameless", "last"])
async def test_every_reply_with_something_in_it_tells_its_dialect(response: ModelInferResponse) -> None:
    for data, dialect in ((response.SerializeToString(), Dialect.MLSERVER), (enveloped(response), Dialect.TRITON)):
        one = stream()
        reply = one.read(data)
        assert reply is not None
        assert (reply.dialect, await one.ask()) == (dialect, dialect)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        ModelStreamInferResponse(error_message="no").SerializeToString(),
        ModelInferResponse(model_name="m").SerializeToString(),
    ],
    ids=["empty", "an error", "a name"],
)
async def test_what_could_be_of_both_answers_nothing_and_is_taken_for_neither(data: bytes) -> None:
    one = stream()
    reply = one.read(data)
    assert reply is not None
    assert (reply.dialect, reply.answers, await one.ask()) == (None, False, None)


@pytest.mark.parametrize("setting", list(Dialect))
def test_a_reply_of_another_dialect_than_that_of_the_stream_is_not_read(setting: Dialect) -> None:
    replies = {Dialect.MLSERVER: PLAIN.SerializeToString(), Dialect.TRITON: enveloped(PLAIN)}
    known, seen = stream(setting), stream()
    seen.read(replies[setting])
    for one in (known, seen):
        for dialect, data in replies.items():
            assert (one.read(data) is None) == (dialect is not setting)


def test_an_answer_in_one_of_two_readings_is_an_answer() -> None:
    # The version of a plain reply may be any text, and this one is a reply with an output in the other dialect.
    inner = NAMELESS.SerializeToString().decode()
    reply = stream().read(ModelInferResponse(model_name="m", model_version=inner).SerializeToString())
    assert reply is not None
    assert reply.answers


def test_an_envelope_with_a_field_that_nobody_knows_is_not_two_strings_without_an_answer() -> None:
    inner = NAMELESS.SerializeToString() + b"\x4a\x01m"
    assert inner.decode()
    assert stream().read(b"\x12" + bytes([len(inner)]) + inner) is None


@pytest.mark.parametrize("data", [b"\xff\xff", PLAIN.SerializeToString() + b"\xba\x3e\x03abc"])
def test_what_cannot_be_read_whole_is_not_read(data: bytes) -> None:
    assert stream().read(data) is None


def test_parameters_are_an_answer_and_the_mark_of_the_last_reply_is_none() -> None:
    told = ModelInferResponse(model_name="m")
    told.parameters["label"].string_param = "stop"
    for response, answers in ((told, True), (LAST, False)):
        reply = stream().read(enveloped(response))
        assert reply is not None
        assert reply.answers is answers


def test_a_reply_is_changed_in_its_envelope() -> None:
    for data in (enveloped(PLAIN), PLAIN.SerializeToString()):
        reply = stream().read(data)
        assert reply is not None
        assert reply.message.SerializeToString() == data
        reply.response.id = "8"
        changed = stream().read(reply.message.SerializeToString())
        assert changed is not None
        assert changed.response.id == "8"


def test_an_error_in_place_of_a_last_reply_is_the_last() -> None:
    error = ModelStreamInferResponse.FromString(error_reply("no", model="m", request_id="7", like=LAST))
    assert error.error_message == "no"
    assert (error.infer_response.model_name, error.infer_response.id) == ("m", "7")
    assert error.infer_response.parameters[FINAL].bool_param
    assert not ModelStreamInferResponse.FromString(
        error_reply("no", model="m", request_id="7", like=PLAIN)
    ).infer_response.parameters
