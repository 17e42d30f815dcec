"""Sidecars that ask a reference model: where it runs, what is said about it, and what happens if it fails."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from guard.classifiers import ExportedClassifier, decode
from guard.evidence import EvidenceLog
from guard.profiles import Profile
from guard.protocol import sidecar_pb2
from guard.protocol.inference_pb2 import ModelInferRequest, ModelStreamInferResponse
from guard.protocol.messages import pack_bytes
from guard.protocol.tensors import float_output, unpack_bytes
from guard.screening import Judgement, ReferenceAnswers
from guard.testing import InferenceServer
from tests.compared import Compared, clean, compared, opposed, recalibrated, triggered
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Client,
    Floats,
    Launcher,
    Reply,
    Sidecar,
    command,
    connected,
    environment,
    eventually,
    infer_request,
    refused_start,
)

SOURCES = ("embedded", "tower", "reading")
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return compared(tmp_path_factory.mktemp("compared"))


@dataclass(frozen=True)
class Models:
    """The suspect and its reference model, with the profile that compares them."""

    suspect: ExportedClassifier
    reference: ExportedClassifier
    profile: Profile

    def judge(self, pixels: NDArray[np.uint8], rule: str) -> Judgement:
        """What a sidecar must decide about images."""
        detector = self.profile.detector(near_only=rule == "near")
        embeddings, _ = self.suspect.run(self.suspect.preprocessing.normalise(pixels))
        scores = detector.screen.score_samples(embeddings)
        if rule != "off":
            rows = np.flatnonzero(detector.screen.near(scores)) if rule == "near" else np.arange(len(pixels))
            answers = ReferenceAnswers(*self.reference.run(self.reference.preprocessing.normalise(pixels[rows])))
            scores = detector.screen.with_opinion(scores, answers, rows)
        return detector.judge(scores)

    def inputs(self, pixels: NDArray[np.uint8]) -> Floats:
        return self.suspect.preprocessing.normalise(pixels)


@pytest.fixture(scope="module")
def models(made: Compared) -> Models:
    profile = Profile.open(made.profile)
    return Models(
        ExportedClassifier(made.model, threads=1, gpu=False), profile.load_reference_model(threads=1), profile
    )


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[InferenceServer]:
    """An upstream server that takes tensors and files."""

    def model(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        given, preprocessing = inputs["image"], models.suspect.preprocessing
        if given.dtype == object:
            given = np.stack([preprocessing(decode(bytes(file))) for file in given.tolist()])
        embeddings, logits = models.suspect.run(given)
        return {"logits": logits, "embedding": embeddings}

    with InferenceServer(model) as running:
        yield running


@pytest.fixture
def upstream(server: InferenceServer) -> InferenceServer:
    server.reset()
    return server


def source_arguments(source: str, server: InferenceServer, made: Compared) -> tuple[str | Path, ...]:
    return {
        "embedded": ("--model", made.model),
        "tower": ("--upstream", server.address, "--model", made.model),
        "reading": ("--upstream", server.address, "--embedding-output", "embedding"),
    }[source]


PIXELS = np.concatenate([clean(30).numpy(), triggered(30).numpy()])


def batch(client: Client, images: Floats, step: int = 20) -> list[Reply]:
    return [client.infer(infer_request(images[i : i + step])) for i in range(0, len(images), step)]


def texts(replies: list[Reply], name: str) -> list[str]:
    found = []
    for reply in replies:
        index = reply.outputs.index(name)
        found += [item.decode() for item in unpack_bytes(reply.response.raw_output_contents[index])]
    return found


@pytest.mark.parametrize("rule", ["all", "near", "off"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_sidecar_decides_as_the_detector_does_and_asks_about_no_other_image(
    source: str, rule: str, launch: Launcher, made: Compared, models: Models, upstream: InferenceServer
) -> None:
    expected, images = models.judge(PIXELS, rule), models.inputs(PIXELS)
    asked = expected.scores.asked
    assert {"all": asked.all(), "off": not asked.any(), "near": 0 < asked.sum() < len(asked)}[rule]
    arguments = source_arguments(source, upstream, made)
    with launch("--profile", made.profile, *arguments, "--second-opinion", rule) as running:
        with connected(running.address) as client:
            replies = batch(client, images)
        assert texts(replies, "guard_decision") == ["flag" if flag else "pass" for flag in expected.flags]
        assert texts(replies, "guard_decided_by") == list(expected.scores.decided_by)
        if rule != "off":
            answers = [made.base.classes.names[k] if k >= 0 else "" for k in expected.scores.answers]
            assert texts([r for r in replies if "guard_reference" in r.outputs], "guard_reference") == [
                answers[row]
                for start, reply in zip(range(0, 60, 20), replies, strict=True)
                for row in range(start, start + 20)
                if "guard_reference" in reply.outputs
            ]
        agrees = (expected.scores.answers == expected.scores.classes)[asked] if asked.any() else asked[asked]
        found = {
            result: running.metric("guard_second_opinions_total", model="classifier", result=result)
            for result in ("agrees", "differs", "not_near", "not_drawn", "failed")
        }
        assert found == {
            "agrees": agrees.sum(),
            "differs": (~agrees).sum(),
            "not_near": (~asked).sum() if rule == "near" else 0,
            "not_drawn": 0,
            "failed": 0,
        }
        assert running.metric("guard_check_duration_seconds_count", model="classifier", stage="second opinion") == (
            0 if rule == "off" else 3
        )


@pytest.mark.parametrize("source", SOURCES)
def test_by_default_it_is_asked_about_all_images_if_there_is_a_reference_model(
    source: str, launch: Launcher, made: Compared, upstream: InferenceServer
) -> None:
    arguments = source_arguments(source, upstream, made)
    with launch("--profile", made.profile, *arguments) as running:
        assert running.announced["models"][0]["second_opinion"] == "all"
    with launch("--profile", made.plain, *arguments) as running:
        assert running.announced["models"][0]["second_opinion"] == "off"


def test_a_trigger_that_nothing_reconstructed_is_flagged_and_the_reply_and_the_log_say_by_what(
    launch: Launcher, made: Compared, models: Models, tmp_path: Path
) -> None:
    expected, alone = models.judge(PIXELS, "all"), models.judge(PIXELS, "off")
    disagree = expected.scores.answers != expected.scores.classes
    row = int(np.flatnonzero(expected.flags & ~alone.flags & disagree)[0])
    name, divergence = expected.scores.decided_by[row], float(expected.scores.parts["divergence"][row])
    assert name in {"divergence", "residual"}
    with launch("--profile", made.profile, "--model", made.model, "--second-opinion", "all",
                "--state-dir", tmp_path / "state", "--admin", "127.0.0.1:0") as running:  # fmt: skip
        with grpc.insecure_channel(str(running.announced["admin"])) as channel:
            listed = channel.unary_unary("/guard.v1.Sidecar/ListModels")(b"", timeout=WAIT_SECONDS)
        opinion = sidecar_pb2.ListModelsResponse.FromString(listed).models[0].second_opinion
        assert (opinion.requests, opinion.kind, opinion.digest) == ("all", "base", made.base.digest.root)
        assert 0.5 < opinion.agreement <= 1
        with connected(running.address) as client:
            reply = client.infer(infer_request(models.inputs(PIXELS[row : row + 1])))
        assert reply.decision == "flag"
        assert reply.parameter("guard_decided_by") == name
        assert reply.parameter("guard_reference") != "class 3"
        assert reply.parameter("guard_divergence") == pytest.approx(divergence, rel=1e-3)
        assert reply.parameter("guard_residual") == pytest.approx(expected.scores.parts["residual"][row], rel=1e-3)
        assert "guard_trigger" not in reply.response.parameters
        trailing = dict(reply.trailing)
        assert trailing["guard-decided-by"] == name
        assert trailing["guard-reference"] == reply.parameter("guard_reference")
        assert float(trailing["guard-divergence"]) == pytest.approx(divergence, rel=1e-3)
        assert running.metric("guard_flagged_score_total", model="classifier", score=name) == 1
        log = tmp_path / "state" / "evidence.sqlite"
        eventually(lambda: EvidenceLog(log).count() == 1, "the record")
    (record,) = EvidenceLog(log).records()
    assert (record.decided_by, record.predicted, record.trigger) == (name, "class 3", "")
    assert record.reference == reply.parameter("guard_reference")
    assert record.scores["divergence"] == pytest.approx(divergence, rel=1e-3)
    assert record.thresholds["score"] == pytest.approx(models.profile.detector().threshold.value)
    assert set(record.scores) == {"score", "k-distance", "divergence", "residual"}
    shown = subprocess.run(
        [sys.executable, "-m", "guard", "log", str(log), "--decided-by", name],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert record.reference in shown.stdout
    assert name in shown.stdout


def test_of_a_share_the_requests_are_drawn_and_each_is_judged_by_its_own_threshold(
    launch: Launcher, made: Compared, models: Models
) -> None:
    images = models.inputs(PIXELS)
    asked, alone = models.judge(PIXELS, "all"), models.judge(PIXELS, "off")
    with launch("--profile", made.profile, "--model", made.model, "--second-opinion", "0.5") as running:
        with connected(running.address) as client:
            replies = [client.infer(infer_request(images[row : row + 1])) for row in range(60)]
        drawn = np.array(["guard_reference" in reply.response.parameters for reply in replies])
        assert 5 < drawn.sum() < 55
        expected = np.where(drawn, asked.p_values, alone.p_values)
        np.testing.assert_allclose([reply.parameter("guard_p_value") for reply in replies], expected)
        assert running.metric("guard_second_opinions_total", model="classifier", result="not_drawn") == 60 - drawn.sum()


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).resize((40, 40)).save(buffer, kind)
    return buffer.getvalue()


def files_request(*files: bytes, **more: Any) -> ModelInferRequest:
    tensor = ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[len(files)])
    return ModelInferRequest(model_name="classifier", inputs=[tensor], raw_input_contents=[pack_bytes(files)], **more)


@pytest.mark.parametrize("rule", ["all", "near", "off"])
def test_the_server_receives_the_pixels_that_the_reference_model_sees(
    rule: str, launch: Launcher, made: Compared, models: Models, upstream: InferenceServer
) -> None:
    """Otherwise an image with two readings could show the server a trigger, and the reference model none."""
    files = [encoded(each, "JPEG") for each in PIXELS[:20]]
    pixels = np.stack([models.suspect.preprocessing.pixels(decode(file)) for file in files])
    arguments = source_arguments("reading", upstream, made)
    with (
        launch("--profile", made.profile, *arguments, "--second-opinion", rule) as running,
        connected(running.address) as client,
    ):
        reply = client.infer(files_request(*files))
    (call,) = (call for call in upstream.received if call.method == "ModelInfer")
    received = [bytes(file) for file in call.inputs["image"].tolist()]
    if rule == "off":
        assert received == files
    else:
        for file, given in zip(received, pixels, strict=True):
            image = Image.open(io.BytesIO(file))
            assert (image.format, image.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), given)
    expected = models.judge(pixels, rule)
    assert texts([reply], "guard_decision") == ["flag" if flag else "pass" for flag in expected.flags]
    p_values = float_output(reply.response, "guard_p_value")
    assert p_values is not None
    np.testing.assert_allclose(p_values, expected.p_values, rtol=1e-5)


def test_an_image_that_cannot_be_read_has_no_second_opinion_and_frees_no_other(
    launch: Launcher, made: Compared, upstream: InferenceServer
) -> None:
    """It is a palette, which is read in several ways, and forwarded as it is."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(PIXELS[0].transpose(1, 2, 0))).quantize(16).save(buffer, "PNG")
    files = [encoded(PIXELS[1]), buffer.getvalue(), encoded(PIXELS[2])]
    arguments = source_arguments("reading", upstream, made)
    with (
        launch("--profile", made.profile, *arguments, "--forward", "as-sent", "--failure-policy", "open") as running,
        connected(running.address) as client,
    ):
        reply = client.infer(files_request(*files))
    found = texts([reply], "guard_decision")
    assert found[1] == "unchecked"
    assert reply.decision == "unchecked"
    assert reply.parameter("guard_reason") == "input_unreadable"
    assert texts([reply], "guard_reference")[1] == ""


FAULTY = """
import os, pathlib
from guard.sidecar.decisions.opinions import SecondOpinions

ask, folder = SecondOpinions.ask, pathlib.Path(os.environ["FAULTS"])

def faulty(self, images, rows):
    if (folder / "raise").exists():
        raise ZeroDivisionError("broken on purpose")
    if (folder / "block").exists():
        (folder / "gate").read_bytes()
    return ask(self, images, rows)

SecondOpinions.ask = faulty
"""
"""Loaded by the sidecar's interpreter as it starts: a reference model that fails, or waits for somebody at the gate."""


@contextmanager
def faulty_sidecar(folder: Path, *arguments: str | Path) -> Iterator[Sidecar]:
    os.mkfifo(folder / "gate")
    (folder / "sitecustomize.py").write_text(FAULTY, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    variables = {**environment(), "PYTHONPATH": path, "FAULTS": str(folder)}
    with (folder / "log").open("wb") as errors:
        process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=errors, env=variables)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "log").read_text(encoding="utf-8")
        yield Sidecar(process, json.loads(line), folder / "log")
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("fault", ["timeout", "error"])
@pytest.mark.parametrize("source", SOURCES)
def test_without_the_reference_model_a_request_is_unchecked_and_a_flag_of_another_score_remains(
    source: str, fault: str, made: Compared, models: Models, upstream: InferenceServer, tmp_path: Path
) -> None:
    unlike = opposed(30).numpy()
    odd = unlike[models.judge(unlike, "off").flags][:1]
    assert not models.judge(PIXELS[:1], "off").flags.any()
    arguments = source_arguments(source, upstream, made)
    with (
        faulty_sidecar(
            tmp_path, "--profile", made.profile, *arguments, "--second-opinion", "all", "--failure-policy", "open",
            "--state-dir", tmp_path / "state", *(("--timeout", "0.5") if fault == "timeout" else ()),
        ) as running,
        connected(running.address) as client,
    ):  # fmt: skip
        (tmp_path / ("block" if fault == "timeout" else "raise")).touch()

        def answer(pixels: NDArray[np.uint8]) -> Reply:
            reply = client.infer(infer_request(models.inputs(pixels)))
            if fault == "timeout":
                (tmp_path / "gate").write_bytes(b"")
            return reply

        reply = answer(PIXELS[:1])
        assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", fault)
        assert "logits" in reply.outputs
        reply = answer(odd)
        assert (reply.decision, reply.parameter("guard_reason")) == ("flag", fault)
        assert reply.parameter("guard_decided_by") == "k-distance"
        assert running.metric("guard_unchecked_total", model="classifier", reason=fault) == 1
        assert running.metric("guard_second_opinions_total", model="classifier", result="failed") == 2
        log = tmp_path / "state" / "evidence.sqlite"
        eventually(lambda: EvidenceLog(log).count() == 1, "the record of the flagged image")
        (tmp_path / ("block" if fault == "timeout" else "raise")).unlink()
        assert answer_again(client, models).decision == "pass"


def answer_again(client: Client, models: Models) -> Reply:
    return client.infer(infer_request(models.inputs(PIXELS[:1])))


@pytest.mark.parametrize("source", SOURCES)
def test_under_the_policy_closed_a_request_without_a_wanted_opinion_is_refused(
    source: str, made: Compared, models: Models, upstream: InferenceServer, tmp_path: Path
) -> None:
    arguments = source_arguments(source, upstream, made)
    with (
        faulty_sidecar(tmp_path, "--profile", made.profile, *arguments, "--second-opinion", "all") as running,
        connected(running.address) as client,
    ):
        (tmp_path / "raise").touch()
        error = client.refused(infer_request(models.inputs(PIXELS[:1])))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(error.trailing_metadata())["guard-reason"] == "error"


def stream(sidecar: Sidecar, *messages: ModelInferRequest) -> list[ModelStreamInferResponse]:
    with connected(sidecar.address) as client:
        call = client.channel.stream_stream(STREAM)
        replies = call(iter([message.SerializeToString() for message in messages]), timeout=WAIT_SECONDS)
        return [ModelStreamInferResponse.FromString(reply) for reply in replies]


@pytest.mark.parametrize("rule", ["all", "near"])
@pytest.mark.parametrize("source", ["tower", "reading"])
def test_each_message_of_a_stream_gets_its_own_second_opinion(
    source: str, rule: str, launch: Launcher, made: Compared, models: Models, upstream: InferenceServer
) -> None:
    rows = [0, 30, 1, 31, 2, 32]
    expected, images = models.judge(PIXELS[rows], rule), models.inputs(PIXELS[rows])
    files = [encoded_as_is(each) for each in PIXELS[rows]]
    arguments = source_arguments(source, upstream, made)
    with launch("--profile", made.profile, *arguments, "--second-opinion", rule) as running:
        for messages in (
            [infer_request(images[k : k + 1], id=str(k)) for k in range(6)],
            [files_request(file, id=str(k)) for k, file in enumerate(files)],
        ):
            replies = [reply.infer_response for reply in stream(running, *messages)]
            assert [reply.id for reply in replies] == [str(k) for k in range(6)]
            found = [reply.parameters["guard_decision"].string_param for reply in replies]
            assert found == ["flag" if flag else "pass" for flag in expected.flags]
            given = ["guard_reference" in reply.parameters for reply in replies]
            assert given == expected.scores.asked.tolist()


def encoded_as_is(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def test_requests_of_a_stream_with_the_same_id_are_not_joined_with_answers_to_each_other(
    launch: Launcher, made: Compared, models: Models, upstream: InferenceServer
) -> None:
    images = models.inputs(PIXELS[[0, 30]])
    arguments = source_arguments("reading", upstream, made)
    with (
        launch("--profile", made.profile, *arguments, "--failure-policy", "open") as running,
        connected(running.address) as client,
    ):
        upstream.open.clear()
        call = client.channel.stream_stream(STREAM)
        messages = [infer_request(images[k : k + 1], id="same").SerializeToString() for k in range(2)]
        replies = call(iter(messages), timeout=WAIT_SECONDS)
        name, labels = "guard_check_duration_seconds_count", {"model": "classifier", "stage": "second opinion"}
        eventually(lambda: running.metric(name, **labels) == 2, "the second opinions")
        upstream.open.set()
        found = [ModelStreamInferResponse.FromString(reply).infer_response for reply in replies]
    reasons = {reply.parameters["guard_reason"].string_param for reply in found}
    decisions = {reply.parameters["guard_decision"].string_param for reply in found}
    assert (decisions, reasons) == ({"unchecked"}, {"reply_unmatched"})


def test_another_reference_model_on_disk_is_taken_without_a_restart(
    launch: Launcher, made: Compared, models: Models, tmp_path: Path
) -> None:
    folder = tmp_path / "profile"
    shutil.copytree(made.profile, folder)
    arguments = ("--profile", folder, "--model", made.model, "--second-opinion", "all")
    with launch(*arguments) as running, connected(running.address) as client:
        assert "guard_reference" in client.infer(infer_request(models.inputs(PIXELS[:1]))).response.parameters
        recalibrated(made, folder, 0.25)
        eventually(lambda: running.metric("guard_profile_reloads_total", model="classifier") == 1, "the reload")
        reply = client.infer(infer_request(models.inputs(PIXELS[30:31])))
        assert reply.parameter("guard_decided_by") in {"residual", "divergence"}
        # A profile without the reference model that it names is not used.
        shutil.rmtree(folder / "reference-model")
        eventually(lambda: running.metric("guard_profile_stale", model="classifier") == 1, "that it is told")
        assert "guard_reference" in client.infer(infer_request(models.inputs(PIXELS[:1]))).response.parameters


def removed(folder: Path, _: Compared) -> None:
    shutil.rmtree(folder / "reference-model")


def damaged(folder: Path, _: Compared) -> None:
    (folder / "reference-model" / "model.onnx").write_bytes(b"no model")


def swapped(folder: Path, made: Compared) -> None:
    shutil.rmtree(folder / "reference-model")
    shutil.copytree(made.model, folder / "reference-model")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (removed, "is not an exported classifier"),
        (damaged, "is not the file that was exported"),
        (swapped, "is the export of another model than the reference model of the profile"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--second-opinion", "all")])
def test_a_reference_model_that_cannot_be_used_ends_the_start_with_one_line(
    spoil: Any, message: str, more: tuple[str, ...], made: Compared, tmp_path: Path
) -> None:
    folder = tmp_path / "profile"
    shutil.copytree(made.profile, folder)
    spoil(folder, made)
    code, lines = refused_start("--profile", folder, "--model", made.model, *more)
    assert code == 4
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("rule", ["all", "near", "0.5"])
def test_a_profile_without_a_reference_model_gives_none_where_it_is_asked_for(rule: str, made: Compared) -> None:
    code, lines = refused_start("--profile", made.plain, "--model", made.model, "--second-opinion", rule)
    assert code == 4
    assert "has no reference model: run guard calibrate" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        ((), "all requests; reference model base (base)"),
        (("--second-opinion", "near"), "requests near the threshold; reference model base (base)"),
        (("--second-opinion", "off"), "off, though the profile has a reference model base"),
    ],
)
def test_a_rehearsal_says_whether_the_reference_model_is_in_use(
    arguments: tuple[str, ...], finding: str, made: Compared
) -> None:
    done = subprocess.run(
        command("--profile", made.profile, "--model", made.model, "--check", *arguments),
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    assert finding in done.stdout + done.stderr
