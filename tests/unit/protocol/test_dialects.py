import pytest
from google.protobuf.message import DecodeError

from guard.protocol.dialects import FINAL, Dialect, error_reply, opened, seen_in
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


@pytest.mark.parametrize("response", [PLAIN, NAMELESS, LAST], ids=["whole", "nameless", "last"])
def test_every_reply_with_something_in_it_tells_its_dialect(response: ModelInferResponse) -> None:
    assert seen_in(response.SerializeToString()) is Dialect.MLSERVER
    assert seen_in(enveloped(response)) is Dialect.TRITON


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        ModelStreamInferResponse(error_message="no").SerializeToString(),
        ModelInferResponse(model_name="m").SerializeToString(),
        ModelInferResponse(model_name="m", model_version="1").SerializeToString(),
        b"\xff\xff",
    ],
    ids=["empty", "an error", "a name", "name and version", "no message"],
)
def test_what_could_be_of_both_is_taken_for_neither(reply: bytes) -> None:
    assert seen_in(reply) is None


def test_a_reply_is_changed_in_its_envelope() -> None:
    for dialect, data in ((Dialect.TRITON, enveloped(PLAIN)), (Dialect.MLSERVER, PLAIN.SerializeToString())):
        message, response = opened(data, dialect)
        assert message.SerializeToString() == data
        response.id = "8"
        assert opened(message.SerializeToString(), dialect)[1].id == "8"
    with pytest.raises(DecodeError):
        opened(b"\xff\xff", None)


def test_an_error_in_place_of_a_last_reply_is_the_last() -> None:
    error = ModelStreamInferResponse.FromString(error_reply("no", model="m", request_id="7", like=LAST))
    assert error.error_message == "no"
    assert (error.infer_response.model_name, error.infer_response.id) == ("m", "7")
    assert error.infer_response.parameters[FINAL].bool_param
    assert not ModelStreamInferResponse.FromString(
        error_reply("no", model="m", request_id="7", like=PLAIN)
    ).infer_response.parameters
