"""Ways around screening that an upstream server offers, tried one by one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from guard.classifiers import ExportedClassifier
from guard.protocol.inference_pb2 import ModelInferRequest, RepositoryModelLoadRequest
from guard.sidecar.telemetry.metrics import UNKNOWN
from guard.testing import InferenceServer
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Client,
    Floats,
    Launcher,
    Sidecar,
    connected,
    eventually,
    infer_request,
    pairs,
)

OIP, MLSERVERS_OWN = "/inference.GRPCInferenceService/", "/inference.model_repository.ModelRepositoryService/"
TORCHSERVE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
REGISTER = ("SystemSharedMemoryRegister", "CudaSharedMemoryRegister")


@pytest.fixture(scope="module")
def running_server(classify: ExportedClassifier) -> Iterator[InferenceServer]:
    def model(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        embeddings, logits = classify.run(inputs["image"])
        return {"logits": logits, "embedding": embeddings}

    methods = dict.fromkeys((*REGISTER, TORCHSERVE), list)
    with InferenceServer(model, dialect="mlserver", name="mlserver", methods=methods) as server:
        yield server


@pytest.fixture
def server(running_server: InferenceServer) -> InferenceServer:
    running_server.reset()
    return running_server


@pytest.fixture(scope="module")
def closed(
    launch: Launcher, exported: Path, served_profile: Path, running_server: InferenceServer
) -> Iterator[Sidecar]:
    """With every setting as it comes."""
    with launch("--upstream", running_server.address, "--model", exported, "--profile", served_profile) as running:
        yield running


@pytest.fixture(scope="module")
def opened(
    launch: Launcher, exported: Path, served_profile: Path, running_server: InferenceServer
) -> Iterator[Sidecar]:
    with launch("--upstream", running_server.address, "--model", exported, "--profile", served_profile,
                "--failure-policy", "open", "--allow-model-control", "--version", "3") as running:  # fmt: skip
        yield running


@pytest.fixture
def client(closed: Sidecar) -> Iterator[Client]:
    with connected(closed.address) as connection:
        yield connection


@pytest.fixture
def open_client(opened: Sidecar) -> Iterator[Client]:
    with connected(opened.address) as connection:
        yield connection


def call(client: Client, path: str, data: bytes = b"") -> bytes:
    reply: bytes = client.channel.unary_unary(path)(data, timeout=WAIT_SECONDS)
    return reply


def refused(client: Client, path: str, data: bytes = b"") -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call(client, path, data)
    return caught.value


def reached(server: InferenceServer, name: str) -> bool:
    return any(each.method.endswith(name) for each in server.received)


def load(**parameters: str) -> bytes:
    message = RepositoryModelLoadRequest(model_name="classifier")
    for name, value in parameters.items():
        message.parameters[name.replace("__", ":")].string_param = value
    return message.SerializeToString()


@pytest.mark.parametrize("service", [OIP, MLSERVERS_OWN])
@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_models_are_not_loaded_or_unloaded(client: Client, server: InferenceServer, service: str, method: str) -> None:
    error = refused(client, service + method, load())
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "allow_model_control" in error.details()
    assert not reached(server, method)


def test_an_unmodified_client_is_told_so(closed: Sidecar, server: InferenceServer) -> None:
    refusal = pytest.raises(InferenceServerException, match="models are not loaded")
    with triton.InferenceServerClient(closed.address) as connection, refusal:
        connection.load_model("classifier", config="{}", files={"file:1/model.onnx": b"anything"})
    assert closed.metric("guard_refused_total", code="PERMISSION_DENIED") >= 1
    assert not reached(server, "RepositoryModelLoad")


@pytest.mark.parametrize("service", [OIP, MLSERVERS_OWN])
@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_where_the_operator_allows_it_they_are(
    open_client: Client, server: InferenceServer, service: str, method: str
) -> None:
    call(open_client, service + method, load(unload_dependents="true"))
    # Between them come the sidecar's own questions whether the server is ready.
    assert [seen.data for seen in server.received if seen.method.endswith(method)][-1] == load(unload_dependents="true")


@pytest.mark.parametrize(
    "data", [load(config="{}"), load(file__1="x"), load(other="", config="")], ids=["config", "file", "two"]
)
def test_a_model_that_a_client_brings_along_is_never_loaded(
    open_client: Client, server: InferenceServer, data: bytes
) -> None:
    error = refused(open_client, OIP + "RepositoryModelLoad", data)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "was never vetted" in error.details()
    assert not reached(server, "RepositoryModelLoad")


def test_a_load_that_cannot_be_read_is_refused(open_client: Client, server: InferenceServer) -> None:
    error = refused(open_client, OIP + "RepositoryModelLoad", b"\xff\xff")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not reached(server, "RepositoryModelLoad")


def test_the_list_of_models_is_open(client: Client, server: InferenceServer) -> None:
    for service in (OIP, MLSERVERS_OWN):
        call(client, service + "RepositoryIndex")
    assert [each.method for each in server.received if "Index" in each.method] == [
        "RepositoryIndex",
        MLSERVERS_OWN + "RepositoryIndex",
    ]


@pytest.mark.parametrize("method", REGISTER)
def test_shared_memory_is_registered_under_open_only(
    client: Client, open_client: Client, server: InferenceServer, method: str
) -> None:
    error = refused(client, OIP + method, b"\x0a\x01x")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "shared memory" in error.details()
    assert not reached(server, method)
    assert call(open_client, OIP + method, b"\x0a\x01x") == b"\x0a\x01x"


def in_shared_memory(images: Floats, where: str) -> ModelInferRequest:
    request = infer_request(images[:1])
    if where == "another input":
        request.inputs.add(name="mask", datatype="FP32", shape=[1])
        request.raw_input_contents.append(bytes(4))
    tensor = request.outputs.add(name="logits") if where == "an output" else request.inputs[-1]
    tensor.parameters["shared_memory_region"].string_param = "region"
    return request


@pytest.mark.parametrize("where", ["the input", "another input", "an output"])
def test_what_lies_in_shared_memory_is_not_checked_and_not_asked(
    client: Client, open_client: Client, server: InferenceServer, clean: Floats, where: str
) -> None:
    request = in_shared_memory(clean, where)
    error = client.refused(request)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "shared_memory"
    assert not reached(server, "ModelInfer")
    server.answer = lambda _: server.respond(infer_request(clean[:1]).SerializeToString())
    reply = open_client.infer(request)
    assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "shared_memory")


@pytest.mark.parametrize(("name", "version"), [("other", ""), ("classifier", "2"), ("Classifier", ""), ("", "")])
def test_a_model_or_version_without_a_profile_is_not_asked(
    client: Client, open_client: Client, server: InferenceServer, clean: Floats, name: str, version: str
) -> None:
    request = infer_request(clean[:1], model_name=name, model_version=version)
    assert client.refused(request).code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not reached(server, "ModelInfer")
    reply = open_client.infer(request)
    assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "model_unknown")


def test_the_version_of_the_profile_is_served_and_an_answer_of_another_one_is_not_taken_for_it(
    open_client: Client, server: InferenceServer, clean: Floats
) -> None:
    request = infer_request(clean[:1], model_version="3")
    assert open_client.infer(request).decision in {"pass", "flag"}
    # The server has a newer version, and gives its answer to those who name none.
    server.answer = lambda _: server.respond(infer_request(clean[:1], model_version="4").SerializeToString())
    reply = open_client.infer(infer_request(clean[:1]))
    assert reply.decision in {"unchecked", "flag"}


def test_other_inference_protocols_are_refused_under_closed_and_counted_under_open(
    client: Client, open_client: Client, opened: Sidecar, server: InferenceServer
) -> None:
    error = refused(client, TORCHSERVE, b"x")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not reached(server, TORCHSERVE)
    assert call(open_client, TORCHSERVE, b"x") == b"x"
    eventually(
        lambda: opened.metric("guard_unchecked_total", model=UNKNOWN, reason="protocol_unknown") == 1, "counting"
    )


def test_a_stream_is_no_way_around_either(client: Client, server: InferenceServer, clean: Floats) -> None:
    def stream(request: ModelInferRequest) -> Any:
        messages = iter([request.SerializeToString()])
        with pytest.raises(grpc.RpcError) as caught:
            list(client.channel.stream_stream(OIP + "ModelStreamInfer")(messages, timeout=WAIT_SECONDS))
        return caught.value

    for request in (infer_request(clean[:1], model_name="other"), in_shared_memory(clean, "the input")):
        error = stream(request)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert not reached(server, "Infer")
