import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from tritonclient.utils import InferenceServerException

from guard import __version__
from guard.classifiers import ExportedClassifier
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import pack_bytes
from tests.conftest import CLASSES, SIZE, random_images
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Client,
    Floats,
    Launcher,
    Sidecar,
    connected,
    decisions,
    environment,
    eventually,
    infer_request,
)


@pytest.fixture(scope="module")
def sidecar(launch: Launcher, exported: Path, served_profile: Path) -> Iterator[Sidecar]:
    with launch("--model", exported, "--profile", served_profile, "--mode", "tag") as running:
        yield running


@pytest.fixture(scope="module")
def lenient(launch: Launcher, exported: Path, served_profile: Path) -> Iterator[Sidecar]:
    """Small messages, and open where it cannot decide."""
    with launch("--model", exported, "--profile", served_profile, "--max-message-bytes", "100000",
                "--failure-policy", "open") as running:  # fmt: skip
        yield running


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[Client]:
    with connected(sidecar.address) as connection:
        yield connection


@pytest.fixture
def tritons(sidecar: Sidecar) -> Iterator[Any]:
    with triton.InferenceServerClient(sidecar.address) as connection:
        yield connection


def float_input(images: Floats) -> Any:
    tensor = triton.InferInput("image", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    return tensor


def bytes_input(files: list[bytes]) -> Any:
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=np.object_))
    return tensor


def encoded(index: int, kind: str, seed: int = 5, **more: Any) -> bytes:
    pixels = np.ascontiguousarray(random_images(index + 1, seed=seed)[index].permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **more)
    return buffer.getvalue()


def files_request(*files: bytes) -> ModelInferRequest:
    tensor = ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[len(files)])
    return ModelInferRequest(model_name="classifier", inputs=[tensor], raw_input_contents=[pack_bytes(files)])


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_it_announces_itself_in_one_line(sidecar: Sidecar) -> None:
    assert sidecar.announced["event"] == "serving"
    (model,) = sidecar.announced["models"]
    assert (model["name"], model["version"], model["mode"], model["failure_policy"], model["verdict"]) == (
        "classifier", "1", "tag", "closed", "backdoored",
    )  # fmt: skip


def test_the_five_methods_beside_inference_answer(tritons: Any) -> None:
    assert tritons.is_server_live()
    assert tritons.is_server_ready()
    assert tritons.is_model_ready("classifier")
    assert tritons.is_model_ready("classifier", "1")
    server = tritons.get_server_metadata()
    assert (server.name, server.version) == ("guard", __version__)
    model = tritons.get_model_metadata("classifier")
    assert (model.name, list(model.versions)) == ("classifier", ["1"])
    assert [(item.name, item.datatype, list(item.shape)) for item in model.inputs] == [
        ("image", "FP32", [-1, 3, SIZE, SIZE])
    ]
    assert [(item.name, item.datatype, list(item.shape)) for item in model.outputs] == [
        ("logits", "FP32", [-1, len(CLASSES.names)]),
        ("label", "BYTES", [-1]),
    ]


def test_answers_are_those_of_the_model(tritons: Any, classify: ExportedClassifier, clean: Floats) -> None:
    result = tritons.infer("classifier", [float_input(clean[:5])], request_id="seven")
    _, logits = classify.run(clean[:5])
    np.testing.assert_allclose(result.as_numpy("logits"), logits, atol=1e-4)
    assert [name.decode() for name in result.as_numpy("label")] == [CLASSES.names[i] for i in logits.argmax(1)]
    assert (result.get_response().id, result.get_response().model_version) == ("seven", "1")


def test_one_image_has_its_decision_in_parameters_and_trailers(client: Client, clean: Floats) -> None:
    reply = client.infer(infer_request(clean[:1]))
    assert reply.outputs == ["logits", "label"]
    assert reply.decision in {"pass", "flag"}
    assert reply.parameter("guard_mode") == "tag"
    score, p_value, alpha = (reply.parameter(f"guard_{name}") for name in ("score", "p_value", "alpha"))
    assert (reply.decision == "flag") == (p_value <= alpha)
    trailing = dict(reply.trailing)
    assert trailing["guard-decision"] == reply.decision
    assert float(trailing["guard-score"]) == pytest.approx(score, rel=1e-4)
    assert float(trailing["guard-p-value"]) == pytest.approx(p_value, rel=1e-4)
    assert float(trailing["guard-alpha"]) == alpha == 0.02


def test_a_batch_has_a_decision_and_a_score_for_each_row(tritons: Any, clean: Floats, triggered: Floats) -> None:
    mixed = np.concatenate([clean[:4], triggered[:4]])
    result = tritons.infer("classifier", [float_input(mixed)])
    decided, scores = result.as_numpy("guard_decision"), result.as_numpy("guard_score")
    assert (decided.shape, scores.shape, scores.dtype) == ((8,), (8,), np.float32)
    parameters = result.get_response().parameters
    p_values, alpha = result.as_numpy("guard_p_value"), parameters["guard_alpha"].double_param
    assert (p_values.shape, p_values.dtype) == ((8,), np.float32)
    assert [item == b"flag" for item in decided] == (p_values <= alpha).tolist()
    assert parameters["guard_p_value"].double_param == pytest.approx(float(p_values.min()))
    assert parameters["guard_score"].double_param == pytest.approx(float(scores.max()))
    assert parameters["guard_decision"].string_param == "flag"
    assert parameters["guard_trigger"].string_param == "patch-1"
    alone = [tritons.infer("classifier", [float_input(mixed[i : i + 1])]) for i in range(8)]
    singles = [reply.get_response().parameters["guard_score"].double_param for reply in alone]
    np.testing.assert_allclose(singles, scores, atol=1e-3)


def test_clean_images_mostly_pass_and_triggered_ones_are_mostly_flagged(
    client: Client, sidecar: Sidecar, clean: Floats, triggered: Floats
) -> None:
    counted = sidecar.metric("guard_images_total", model="classifier", decision="flag")
    on_clean, on_triggered = decisions(client, clean), decisions(client, triggered)
    assert list(on_clean).count("pass") >= 0.8 * len(clean)
    assert list(on_triggered).count("flag") >= 0.8 * len(triggered)
    flagged = [*on_clean, *on_triggered].count("flag")
    assert sidecar.metric("guard_images_total", model="classifier", decision="flag") == counted + flagged


def test_typed_contents_are_answered_in_kind(client: Client, clean: Floats) -> None:
    raw = client.infer(infer_request(clean[:2]))
    request = infer_request(clean[:2], raw_input_contents=[])
    request.inputs[0].contents.fp32_contents.extend(clean[:2].ravel().tolist())
    typed = client.infer(request)
    assert (
        typed.outputs
        == raw.outputs
        == ["logits", "label", "guard_decision", "guard_score", "guard_p_value", "guard_decided_by"]
    )
    assert not typed.response.raw_output_contents
    logits = np.frombuffer(raw.response.raw_output_contents[0], np.float32)
    np.testing.assert_allclose(typed.response.outputs[0].contents.fp32_contents, logits, atol=1e-5)
    assert len(typed.response.outputs[1].contents.bytes_contents) == 2
    assert typed.parameter("guard_score") == pytest.approx(raw.parameter("guard_score"), abs=1e-4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_files_are_decided_like_their_pixels(tritons: Any, clean: Floats, kind: str) -> None:
    more = {"lossless": True} if kind == "WEBP" else {}
    files = tritons.infer("classifier", [bytes_input([encoded(i, kind, **more) for i in range(3)])])
    floats = tritons.infer("classifier", [float_input(clean[:3])])
    np.testing.assert_allclose(files.as_numpy("logits"), floats.as_numpy("logits"), atol=1e-4)
    np.testing.assert_allclose(files.as_numpy("guard_score"), floats.as_numpy("guard_score"), atol=1e-3)


def test_jpeg_files_are_served_and_decided(tritons: Any) -> None:
    result = tritons.infer("classifier", [bytes_input([encoded(0, "JPEG"), encoded(1, "JPEG")])])
    assert result.as_numpy("logits").shape == (2, len(CLASSES.names))
    assert set(result.as_numpy("guard_decision")) <= {b"pass", b"flag"}


def test_files_of_other_sizes_and_in_typed_contents_are_served(client: Client) -> None:
    buffer = io.BytesIO()
    Image.new("L", (90, 40), 128).save(buffer, "PNG")
    request = files_request(b"")
    del request.raw_input_contents[:]
    request.inputs[0].contents.bytes_contents.append(buffer.getvalue())
    assert client.infer(request).outputs == ["logits", "label"]


@pytest.mark.parametrize("names", [["label"], ["logits"], ["label", "logits"]])
def test_only_the_requested_outputs_are_sent(tritons: Any, clean: Floats, names: list[str]) -> None:
    wanted = [triton.InferRequestedOutput(name) for name in names]
    result = tritons.infer("classifier", [float_input(clean[:1])], outputs=wanted)
    assert {output.name for output in result.get_response().outputs} == set(names)
    assert "guard_decision" in result.get_response().parameters


@pytest.mark.parametrize(
    "name", ["embedding", "guard_score", "x" * 50_000], ids=["embedding", "guard_score", "very long"]
)
def test_an_output_that_is_not_there_is_refused(client: Client, clean: Floats, name: str) -> None:
    request = infer_request(clean[:1])
    request.outputs.add(name=name)
    error = client.refused(request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"there is no output '{name[:50]}" in error.details()


def damaged(images: Floats, what: str) -> ModelInferRequest | bytes:
    """A request with one thing wrong."""
    request = infer_request(images[:2])
    tensor = request.inputs[0]
    if what == "datatype":
        tensor.datatype = "FP64"
    elif what == "size":
        request.raw_input_contents[0] = images[:1].tobytes()
    elif what == "two raw contents":
        request.raw_input_contents.append(b"")
    elif what == "raw and typed":
        tensor.contents.fp32_contents.append(1)
    elif what == "shared memory":
        tensor.parameters["shared_memory_region"].string_param = "region"
    elif what == "no input":
        del request.inputs[:], request.raw_input_contents[:]
    elif what == "long name":
        tensor.name, tensor.datatype = "x" * 100_000, "FP64"
    elif what == "classification":
        request.outputs.add(name="label").parameters["classification"].int64_param = 3
    elif what in {"nan", "inf"}:
        values = images[:2].copy()
        values[1, 2, 3, 4] = float(what)
        request.raw_input_contents[0] = values.tobytes()
    else:
        tensor.shape[:] = {
            "rank": [2, 3 * SIZE * SIZE],
            "channels": [2, SIZE, SIZE, 3],
            "negative": [-2, 3, SIZE, SIZE],
            "empty batch": [0, 3, SIZE, SIZE],
            "large batch": [257, 3, SIZE, SIZE],
        }[what]
    return request


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("datatype", "FP32 images or BYTES files are expected"),
        ("size", "its shape needs"),
        ("rank", "is expected, N from 1 to 256"),
        ("channels", "is expected, N from 1 to 256"),
        ("negative", "is expected, N from 1 to 256"),
        ("empty batch", "is expected, N from 1 to 256"),
        ("large batch", "is expected, N from 1 to 256"),
        ("nan", "not finite"),
        ("inf", "not finite"),
        ("two raw contents", "2 raw contents for 1 inputs"),
        ("raw and typed", "both raw and typed"),
        ("shared memory", "shared memory"),
        ("no input", "there is no input 'image'"),
        ("long name", "input 'xxx"),
        ("classification", "classification is not supported"),
    ],
)
def test_a_malformed_request_is_refused_by_what_is_wrong(
    client: Client, clean: Floats, what: str, message: str
) -> None:
    error = client.refused(damaged(clean, what))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("guard: ")
    assert message in error.details()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x0a\x05ab", b"GET / HTTP/1.1"])
def test_bytes_that_are_no_request_are_refused(client: Client, data: bytes) -> None:
    error = client.refused(data)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == (
        "guard: the message is not a ModelInferRequest, or has fields that the protocol does not have"
    )


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata"])
def test_bytes_that_are_no_message_are_refused_by_every_method(client: Client, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call(method, b"\xff\xff")
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"guard: not a {method}Request"


def narrow_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (1, 1_000_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "not a readable"),
        (b"not an image", "not a readable"),
        (encoded(0, "JPEG")[:300], "damaged"),
        (encoded(0, "PNG")[:-40], "damaged"),
        (encoded(0, "GIF"), "not a readable"),
        (png_header(60_000, 60_000), "image"),
        (png_header(8_000, 8_000), "more than the limit of 50000000"),
        (narrow_png(), "too narrow"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "GIF", "bomb", "large", "narrow"],
)
def test_a_file_that_cannot_be_used_is_refused(client: Client, file: bytes, message: str) -> None:
    error = client.refused(files_request(encoded(0, "PNG"), file))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("guard: input 'image': ")
    assert message in error.details()


def test_a_damaged_bytes_tensor_is_refused(client: Client) -> None:
    request = files_request(b"x")
    request.raw_input_contents[0] = struct.pack("<I", 1000) + b"x"
    error = client.refused(request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "damaged" in error.details()


def test_values_at_which_the_model_overflows_are_refused_and_not_scored(client: Client, sidecar: Sidecar) -> None:
    error = client.refused(infer_request(np.full((1, 3, SIZE, SIZE), 3e38, np.float32)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "zero or not finite" in error.details()
    assert {item.key: item.value for item in error.trailing_metadata()}["guard-decision"] == "unchecked"
    assert "Traceback" not in sidecar.stderr


def test_under_open_they_are_served_as_unchecked(lenient: Sidecar) -> None:
    with connected(lenient.address) as client:
        reply = client.infer(infer_request(np.full((1, 3, SIZE, SIZE), 3e38, np.float32)))
        assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "input_unreadable")


def test_under_open_a_malformed_request_is_refused_all_the_same(lenient: Sidecar, clean: Floats) -> None:
    with connected(lenient.address) as client:
        assert client.refused(damaged(clean, "nan")).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_above_the_limit_is_refused(lenient: Sidecar, clean: Floats) -> None:
    with connected(lenient.address) as client:
        error = client.refused(infer_request(np.repeat(clean[:1], 40, axis=0)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "100000" in error.details()
        assert client.infer(infer_request(clean[:1])).decision in {"pass", "flag"}


@pytest.mark.parametrize(("name", "version"), [("other", ""), ("classifier", "2"), ("", ""), ("x" * 100_000, "")])
def test_an_unknown_model_or_version_is_not_found(tritons: Any, clean: Floats, name: str, version: str) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: tritons.infer(name, [float_input(clean[:1])], model_version=version),
        lambda: tritons.is_model_ready(name, version),
        lambda: tritons.get_model_metadata(name, version),
    )
    for call in calls:
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        assert "'classifier' (version 1) is served" in caught.value.message()


def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("RepositoryIndex")
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_refusals_are_counted_by_code(client: Client, sidecar: Sidecar, clean: Floats) -> None:
    def counts() -> list[float]:
        return [
            sidecar.metric("guard_refused_total", code="INVALID_ARGUMENT"),
            sidecar.metric("guard_unchecked_total", model="classifier", reason="input_unreadable"),
            sidecar.metric("guard_requests_total", model="classifier", decision="unchecked", mode="tag"),
        ]

    client.refused(damaged(clean, "nan"))
    # A refusal is sent before its request is counted.
    eventually(lambda: sidecar.metric("guard_active_requests") == 0, "the requests before ending")
    before = counts()
    client.refused(damaged(clean, "nan"))
    eventually(lambda: counts() == [count + 1 for count in before], "counting the refusal")


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_serving_for_the_process_and_the_service(client: Client, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(client.channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_SECONDS)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest(service="x"), timeout=10)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_and_describes_the_service(client: Client) -> None:
    database = ProtoReflectionDescriptorDatabase(client.channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    service: Any = pool.FindServiceByName(SERVICE)
    method = service.methods_by_name["ModelInfer"]
    assert method.input_type.full_name == "inference.ModelInferRequest"
    assert method.output_type.full_name == "inference.ModelInferResponse"
    assert {field.name for field in method.input_type.fields} >= {"model_name", "inputs", "raw_input_contents"}
    assert len(service.methods) == 6


def test_the_serving_path_does_not_import_torch() -> None:
    program = (
        "import sys, guard.sidecar.host.server, guard.profiles, guard.screening, guard.cli; "
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_that_was_refused_left_a_traceback_in_the_log(sidecar: Sidecar, lenient: Sidecar) -> None:
    assert "Traceback" not in sidecar.stderr
    assert "Traceback" not in lenient.stderr
