"""One image of a batch that cannot be judged frees none of the others."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from guard.classifiers import ExportedClassifier
from guard.evidence import EVIDENCE_FILE, EvidenceLog, RecordFilter
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.protocol.messages import pack_bytes
from guard.protocol.tensors import add_output
from guard.testing import InferenceServer
from tests.integration.sidecar.conftest import Floats, Launcher, connected, eventually, infer_request, pairs

HUGE = np.float32(3e38)


@pytest.fixture(scope="module")
def server(classify: ExportedClassifier) -> Iterator[InferenceServer]:
    """A server that answers whatever comes, with the embedding."""

    def model(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        images = inputs["image"]
        if images.dtype == object:
            return {"logits": np.zeros((len(images), 6), np.float32)}
        embeddings, logits = classify.run(images.astype(np.float32))
        return {"logits": logits, "embedding": embeddings}

    with InferenceServer(model) as running:
        yield running


@pytest.fixture
def batch(classify: ExportedClassifier, profile: Profile, clean: Floats, triggered: Floats) -> Floats:
    """A clean image, one to spoil, a triggered one."""
    chosen = [
        images[profile.detector().score(classify.run(images)[0]).flags == flag][:1]
        for images, flag in ((clean, False), (clean, False), (triggered, True))
    ]
    return np.concatenate(chosen)


def spoilt(batch: Floats, how: str, classify: ExportedClassifier) -> ModelInferRequest:
    if how == "a broken file":
        files = []
        for image in classify.preprocessing.restore(batch).clip(0, 1):
            buffer = io.BytesIO()
            Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(buffer, "PNG")
            files.append(buffer.getvalue())
        files[1] = files[1][:60]
        request = ModelInferRequest(model_name="classifier", raw_input_contents=[pack_bytes(files)])
        request.inputs.add(name="image", datatype="BYTES", shape=[len(files)])
        return request
    images = batch.copy()
    images[1] = {"NaN": float("nan"), "infinity": float("inf"), "an overflow": float(HUGE)}[how]
    return infer_request(images)


HOW = ("NaN", "infinity", "an overflow", "a broken file")


@pytest.mark.parametrize(
    ("source", "how"), [("own tower", how) for how in HOW] + [("reply", how) for how in HOW if how != "a broken file"]
)
def test_the_others_are_judged_under_open(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    server: InferenceServer,
    classify: ExportedClassifier,
    batch: Floats,
    tmp_path: Path,
    source: str,
    how: str,
) -> None:
    own = ("--model", exported) if source == "own tower" else ("--embedding-output", "embedding")
    arguments = ("--upstream", server.address, "--profile", served_profile, *own, "--failure-policy", "open",
                 "--state-dir", tmp_path / "state")  # fmt: skip
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        reply = client.infer(spoilt(batch, how, classify))
        assert (reply.decision, reply.parameter("guard_reason")) == (
            "flag",
            "input_unreadable" if source == "own tower" else "embedding_missing",
        )
        index = reply.outputs.index("guard_decision")
        assert reply.response.raw_output_contents[index] == pack_bytes([b"pass", b"unchecked", b"flag"])
        scores = np.frombuffer(reply.response.raw_output_contents[index + 1], np.float32)
        assert np.isnan(scores).tolist() == [False, True, False]
        assert np.isfinite([reply.parameter("guard_score"), reply.parameter("guard_p_value")]).all()
        counted = [
            sidecar.metric("guard_images_total", model="classifier", decision=d) for d in ("pass", "unchecked", "flag")
        ]
        assert counted == [1, 1, 1]
    log = EvidenceLog(tmp_path / "state" / EVIDENCE_FILE)
    assert [record.image for record in log.records(RecordFilter())] == [2]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", ["tag", "block"])
def test_under_closed_none_is_served(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    server: InferenceServer,
    classify: ExportedClassifier,
    batch: Floats,
    how: str,
    mode: str,
) -> None:
    arguments = ("--upstream", server.address, "--profile", served_profile, "--model", exported, "--mode", mode)
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        error = client.refused(spoilt(batch, how, classify))
    expected = grpc.StatusCode.PERMISSION_DENIED if mode == "block" else grpc.StatusCode.INVALID_ARGUMENT
    assert error.code() is expected
    assert dict(pairs(error.trailing_metadata()))["guard-decision"] == "flag"


@pytest.mark.parametrize("how", HOW[:3])
def test_the_sidecar_that_serves_itself_judges_the_others_too(
    launch: Launcher, exported: Path, served_profile: Path, classify: ExportedClassifier, batch: Floats, how: str
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--failure-policy", "open")
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        if how != "an overflow":
            assert client.refused(spoilt(batch, how, classify)).code() is grpc.StatusCode.INVALID_ARGUMENT
            return
        reply = client.infer(spoilt(batch, how, classify))
        index = reply.outputs.index("guard_decision")
        assert reply.response.raw_output_contents[index] == pack_bytes([b"pass", b"unchecked", b"flag"])
        eventually(lambda: sidecar.metric("guard_images_total", model="classifier", decision="flag") == 1, "counting")


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 64), (4, 64)])
def test_embeddings_of_another_number_than_the_images_check_none(
    launch: Launcher,
    served_profile: Path,
    server: InferenceServer,
    classify: ExportedClassifier,
    batch: Floats,
    shape: tuple[int, ...],
) -> None:
    """As from a server that pools or squeezes: the embedding of a clean image would clear the others."""
    clean = classify.run(batch[:1])[0]
    wrong = np.resize(clean, (*shape[:-1], clean.shape[1]))

    def answer(data: bytes) -> bytes:
        response = ModelInferResponse(model_name="classifier", id=ModelInferRequest.FromString(data).id)
        add_output(response, "logits", np.zeros((3, 6), np.float32), raw=True)
        add_output(response, "embedding", wrong, raw=True)
        return bytes(response.SerializeToString())

    server.answer = answer
    try:
        arguments = ("--upstream", server.address, "--profile", served_profile, "--embedding-output", "embedding")
        with launch(*arguments) as sidecar, connected(sidecar.address) as client:
            error = client.refused(infer_request(batch))
    finally:
        server.reset()
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "embedding_missing"
