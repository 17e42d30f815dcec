import numpy as np
import pytest

from guard.protocol.inference_pb2 import ModelInferResponse
from guard.protocol.tensors import add_output, float_output
from guard.sidecar import Decision, Mode, Outcome, Reason
from guard.sidecar.inference.annotations import annotate, trailers

LOGITS = np.arange(6, dtype=np.float32).reshape(3, 2)


def outcome(rows: int) -> Outcome:
    flags = np.arange(rows) == rows - 1
    return Outcome(
        Decision.FLAG,
        scores=np.where(flags, 9.0, 1.0).astype(np.float32),
        flags=flags,
        p_values=np.where(flags, 0.001, 0.5),
        alpha=0.01,
        decided_by=("k-distance",) * (rows - 1) + ("match patch-1",),
        answers=("",) * rows,
        triggers=("",) * (rows - 1) + ("patch-1",),
    )


def reply(*, raw: bool) -> ModelInferResponse:
    response = ModelInferResponse(model_name="m", id="7")
    add_output(response, "logits", LOGITS, raw=raw)
    return response


@pytest.mark.parametrize("raw", [True, False])
def test_a_batch_is_annotated_in_the_form_that_the_reply_has(raw: bool) -> None:  # noqa: FBT001
    response = reply(raw=raw)
    annotate(response, outcome(3), Mode.TAG)
    assert [output.name for output in response.outputs] == [
        "logits", "guard_decision", "guard_score", "guard_p_value", "guard_decided_by",
    ]  # fmt: skip
    assert len(response.raw_output_contents) == (5 if raw else 0)
    assert [output.HasField("contents") for output in response.outputs] == [not raw] * 5
    np.testing.assert_array_equal(float_output(response, "logits"), LOGITS)
    np.testing.assert_array_equal(float_output(response, "guard_score"), np.array([1, 1, 9], np.float32))


def test_classes_in_place_of_logits_stay_as_they_are() -> None:
    """Triton's classification extension: an output becomes text, `value:index:label`."""
    response = ModelInferResponse(model_name="m")
    add_output(response, "logits", [b"0.9:1:dog", b"0.8:0:cat", b"0.7:1:dog"], raw=True)
    before = response.raw_output_contents[0], response.outputs[0].SerializeToString()
    annotate(response, outcome(3), Mode.TAG)
    assert (response.raw_output_contents[0], response.outputs[0].SerializeToString()) == before
    assert len(response.raw_output_contents) == len(response.outputs) == 5


def test_where_raw_contents_and_outputs_differ_in_number_nothing_is_added_to_either() -> None:
    """One output went to shared memory: what came after it would be read as its contents."""
    response = reply(raw=True)
    response.outputs.add(name="elsewhere", datatype="FP32", shape=[3])
    annotate(response, outcome(3), Mode.TAG)
    assert [output.name for output in response.outputs] == ["logits", "elsewhere"]
    assert len(response.raw_output_contents) == 1
    assert response.parameters["guard_decision"].string_param == "flag"


def test_one_image_is_annotated_by_parameters_alone() -> None:
    response = reply(raw=True)
    annotate(response, outcome(1), Mode.BLOCK)
    assert [output.name for output in response.outputs] == ["logits"]
    assert response.parameters["guard_trigger"].string_param == "patch-1"
    assert response.parameters["guard_mode"].string_param == "block"


def test_without_a_decision_there_is_a_reason_and_no_score() -> None:
    response = reply(raw=True)
    unchecked = Outcome.unchecked(Reason.TIMEOUT)
    annotate(response, unchecked, Mode.TAG)
    assert {name: value.string_param for name, value in response.parameters.items()} == {
        "guard_decision": "unchecked",
        "guard_mode": "tag",
        "guard_reason": "timeout",
    }
    assert trailers(unchecked) == (("guard-decision", "unchecked"), ("guard-reason", "timeout"))
