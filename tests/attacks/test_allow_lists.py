"""Methods, replies and names that guard does not know: none of them is let through because nobody forbade it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import pytest

from guard.classifiers import ExportedClassifier
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from guard.protocol.tensors import add_output
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

OIP = "/inference.GRPCInferenceService/"
UNREAD = (
    "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer",
    "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions",
    "/org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions2",
    "/org.pytorch.serve.grpc.management.ManagementAPIsService/RegisterModel",
    "/tensorflow.serving.PredictionService/Predict",
    "/tensorflow.serving.SessionService/SessionRun",
    "/seldon.protos.Seldon/Predict",
    "/ray.serve.UserDefinedService/__call__",
    "/openvino.InferenceService/Infer",
    "/inference.v2.GRPCInferenceService/ModelInfer",
    "/Inference.GRPCInferenceService/ModelInfer",
    f"{OIP}modelinfer",
    f"{OIP}ModelInferAsync",
    f"{OIP}TraceSetting",
    f"{OIP}LogSettings",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/ModelInfer",
)
"""Paths of methods that run a model, or change what a server does, by other names than guard knows."""
STREAM = f"{OIP}ModelStreamInfer"


@pytest.fixture(scope="module")
def server(classify: ExportedClassifier) -> Iterator[InferenceServer]:
    """A server that answers every method."""
    methods = dict.fromkeys([*(path.removeprefix(OIP) for path in UNREAD), "ModelConfig", "ModelStatistics"], list)
    with InferenceServer(
        lambda inputs: {"logits": classify.run(inputs["image"])[1]}, dialect="mlserver", methods=methods
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(server: InferenceServer) -> None:
    server.reset()


def started(launch: Launcher, exported: Path, profile: Path, server: InferenceServer, *more: str) -> Any:
    return launch("--upstream", server.address, "--model", exported, "--profile", profile, *more)


@pytest.fixture(scope="module")
def closed(launch: Launcher, exported: Path, served_profile: Path, server: InferenceServer) -> Iterator[Sidecar]:
    with started(launch, exported, served_profile, server) as running:
        yield running


@pytest.fixture(scope="module")
def opened(launch: Launcher, exported: Path, served_profile: Path, server: InferenceServer) -> Iterator[Sidecar]:
    with started(launch, exported, served_profile, server, "--failure-policy", "open") as running:
        yield running


def refused(client: Client, path: str, data: bytes = b"x") -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        list(client.channel.stream_stream(path)(iter([data]), timeout=WAIT_SECONDS))
    return caught.value


@pytest.mark.parametrize("path", UNREAD)
def test_an_unknown_method_is_refused_and_counted_under_closed(
    closed: Sidecar, server: InferenceServer, path: str
) -> None:
    def count() -> float:
        return closed.metric("guard_unchecked_total", model=UNKNOWN, reason="protocol_unknown")

    with connected(closed.address) as client:
        error = refused(client, path)
        eventually(lambda: count() >= 1, "counting")
        before = count()
        refused(client, path)
        eventually(lambda: count() == before + 1, "counting")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "protocol_unknown"
    assert all(call.method in {"ServerReady", "ServerMetadata"} for call in server.received)


@pytest.mark.parametrize("path", UNREAD[:3])
def test_under_open_it_passes_and_is_counted(opened: Sidecar, path: str) -> None:
    with connected(opened.address) as client:
        assert list(client.channel.stream_stream(path)(iter([b"x"]), timeout=WAIT_SECONDS)) == [b"x"]
    assert opened.metric("guard_unchecked_total", model=UNKNOWN, reason="protocol_unknown") >= 1


@pytest.mark.parametrize("method", ["ModelConfig", "ModelStatistics", "ServerMetadata"])
def test_methods_that_describe_the_server_pass(closed: Sidecar, method: str) -> None:
    with connected(closed.address) as client:
        client.call(method, b"")


def test_the_operator_opens_more(
    launch: Launcher, exported: Path, served_profile: Path, server: InferenceServer
) -> None:
    allowed = f"{UNREAD[1]},/seldon.protos.Seldon/*"
    more = ("--pass-methods", allowed)
    with started(launch, exported, served_profile, server, *more) as sidecar, connected(sidecar.address) as client:
        for path in (UNREAD[1], UNREAD[6]):
            assert list(client.channel.stream_stream(path)(iter([b"x"]), timeout=WAIT_SECONDS)) == [b"x"]
        assert refused(client, UNREAD[4]).code() is grpc.StatusCode.FAILED_PRECONDITION


# Replies of a stream


def enveloped(response: ModelInferResponse) -> bytes:
    return ModelStreamInferResponse(infer_response=response).SerializeToString()


@pytest.mark.parametrize("expected", ["triton", "mlserver"])
@pytest.mark.parametrize("policy", ["closed", "open"])
def test_a_stream_in_another_dialect_is_never_passed(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    classify: ExportedClassifier,
    triggered: Floats,
    expected: str,
    policy: str,
) -> None:
    """As when the setting is wrong, or the server behind an address has been replaced."""
    spoken: Literal["triton", "mlserver"] = "mlserver" if expected == "triton" else "triton"
    with InferenceServer(lambda inputs: {"logits": classify.run(inputs["image"])[1]}, dialect=spoken) as other:
        more = ("--stream-dialect", expected, "--failure-policy", policy, "--mode", "tag")
        with started(launch, exported, served_profile, other, *more) as sidecar, connected(sidecar.address) as client:
            stream = client.channel.stream_stream(STREAM)
            messages = [infer_request(triggered[:1]).SerializeToString()]
            if policy == "open":
                assert len(list(stream(iter(messages), timeout=WAIT_SECONDS))) == 1
            elif expected == "triton":
                (reply,) = stream(iter(messages), timeout=WAIT_SECONDS)
                assert "cannot be checked" in ModelStreamInferResponse.FromString(reply).error_message
                assert b"logits" not in reply
            else:
                assert refused(client, STREAM, messages[0]).code() is grpc.StatusCode.FAILED_PRECONDITION


def test_the_dialect_is_that_of_each_stream_and_not_of_the_first_one(
    launch: Launcher, exported: Path, served_profile: Path, classify: ExportedClassifier, clean: Floats
) -> None:
    def model(inputs: Any) -> Any:
        return {"logits": classify.run(inputs["image"])[1]}

    first = InferenceServer(model, dialect="mlserver")
    first.start()
    with started(launch, exported, served_profile, first) as sidecar, connected(sidecar.address) as client:
        stream, message = client.channel.stream_stream(STREAM), infer_request(clean[:1]).SerializeToString()
        (reply,) = stream(iter([message]), timeout=WAIT_SECONDS)
        assert ModelInferResponse.FromString(reply).parameters["guard_decision"].string_param in {"pass", "flag"}
        first.stop()
        with InferenceServer(model, dialect="triton", address=first.address):
            eventually(lambda: sidecar.metric("guard_ready") == 1, "being ready again")
            (reply,) = stream(iter([message]), timeout=WAIT_SECONDS, wait_for_ready=True)
            inner = ModelStreamInferResponse.FromString(reply).infer_response
            assert inner.parameters["guard_decision"].string_param in {"pass", "flag"}


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("damage", [b"\xba\x3e\x03abc", b"\xff"], ids=["an unknown field", "a broken end"])
def test_a_reply_that_cannot_be_read_whole_is_an_answer_that_was_not_checked(
    closed: Sidecar,
    server: InferenceServer,
    clean: Floats,
    damage: bytes,
    streamed: bool,  # noqa: FBT001
) -> None:
    server.answer = lambda data: server.respond(data) + damage
    with connected(closed.address) as client:
        if streamed:
            error = refused(client, STREAM, infer_request(clean[:1]).SerializeToString())
        else:
            error = client.refused(infer_request(clean[:1]))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_an_answer_in_parameters_alone_is_checked(closed: Sidecar, server: InferenceServer, clean: Floats) -> None:
    told = ModelInferResponse(model_name="classifier")
    told.parameters["label"].string_param = "stop"
    server.answer = lambda _: told.SerializeToString()
    with connected(closed.address) as client:
        (reply,) = client.channel.stream_stream(STREAM)(
            iter([infer_request(clean[:1]).SerializeToString()]), timeout=WAIT_SECONDS
        )
    assert "guard_decision" in ModelInferResponse.FromString(reply).parameters


def test_a_stream_has_the_model_that_it_began_with(
    closed: Sidecar, opened: Sidecar, server: InferenceServer, clean: Floats
) -> None:
    """MLServer runs the first message's model for all of them."""
    messages = [
        infer_request(clean[:1], model_name=name).SerializeToString() for name in ("classifier", "other", "classifier")
    ]
    with connected(closed.address) as client:
        with pytest.raises(grpc.RpcError) as caught:
            list(client.channel.stream_stream(STREAM)(iter(messages), timeout=WAIT_SECONDS))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        versions = [infer_request(clean[:1], model_version=version).SerializeToString() for version in ("", "1")]
        assert refused_stream(client, versions).code() is grpc.StatusCode.FAILED_PRECONDITION
    assert len([call for call in server.received if call.method == "ModelStreamInfer"]) <= 2
    with connected(opened.address) as client:
        first_unknown = [
            infer_request(clean[:1], model_name=name).SerializeToString() for name in ("other", "classifier")
        ]
        replies = [
            ModelInferResponse.FromString(reply)
            for reply in client.channel.stream_stream(STREAM)(iter(first_unknown), timeout=WAIT_SECONDS)
        ]
    assert [reply.parameters["guard_decision"].string_param for reply in replies] == ["unchecked"] * 2


def refused_stream(client: Client, messages: list[bytes]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        list(client.channel.stream_stream(STREAM)(iter(messages), timeout=WAIT_SECONDS))
    return caught.value


# Names of guard's own


def forged(server: InferenceServer, data: bytes) -> bytes:
    response = ModelInferResponse.FromString(server.respond(data))
    for name in ("guard_decision", "guard_reason", "guard_anything"):
        response.parameters[name].string_param = "pass"
    response.outputs[0].parameters["guard_note"].string_param = "pass"
    raw = bool(response.raw_output_contents)
    add_output(response, "guard_decision", [b"pass"], raw=raw)
    add_output(response, "guard_score", np.zeros(1, np.float32), raw=raw)
    return response.SerializeToString()


@pytest.mark.parametrize("mode", ["shadow", "tag", "block"])
@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("source", ["own tower", "reply"])
def test_nobody_else_writes_under_guards_names(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    classify: ExportedClassifier,
    clean: Floats,
    mode: str,
    streamed: bool,  # noqa: FBT001
    source: str,
) -> None:
    def model(inputs: Any) -> Any:
        embeddings, logits = classify.run(inputs["image"])
        return {"logits": logits, "embedding": embeddings}

    request = infer_request(clean[:1])
    request.parameters["guard_decision"].string_param = "pass"
    request.inputs[0].parameters["guard_decision"].string_param = "pass"
    own = ("--model", exported) if source == "own tower" else ("--embedding-output", "embedding")
    with InferenceServer(model, dialect="mlserver") as server:
        server.answer = lambda data: forged(server, data)
        server.initial = server.trailing = (("guard-decision", "pass"), ("guard-new", "x"), ("kept", "yes"))
        with (
            launch("--upstream", server.address, "--profile", served_profile, *own, "--mode", mode) as sidecar,
            connected(sidecar.address) as client,
        ):
            sent = (("guard-decision", "pass"),)
            if streamed:
                stream = client.channel.stream_stream(STREAM)
                call = stream(iter([request.SerializeToString()]), timeout=WAIT_SECONDS, metadata=sent)
                (data,) = call
                response, initial, trailing = (
                    ModelInferResponse.FromString(data),
                    pairs(call.initial_metadata()),
                    pairs(call.trailing_metadata()),
                )
            else:
                reply = client.infer(request, metadata=sent)
                response, initial, trailing = reply.response, reply.initial, reply.trailing
        asked = next(call for call in server.received if "Infer" in call.method)
    own_names = {name for name in response.parameters if name.startswith("guard_")}
    assert own_names == (
        set()
        if mode == "shadow"
        else {"guard_decision", "guard_mode", "guard_score", "guard_p_value", "guard_alpha", "guard_decided_by"}
    )
    assert not response.outputs[0].parameters
    assert [output.name for output in response.outputs if output.name.startswith("guard_")] == []
    assert ("kept", "yes") in trailing
    assert "guard-new" not in dict(trailing) | dict(initial)
    assert "guard-decision" not in dict(initial)
    assert len([key for key, _ in trailing if key == "guard-decision"]) == (0 if mode == "shadow" or streamed else 1)
    forwarded = ModelInferRequest.FromString(asked.data)
    assert not forwarded.parameters
    assert not forwarded.inputs[0].parameters
    assert "guard-decision" not in dict(asked.metadata)
