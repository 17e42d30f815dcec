import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard.classifiers import ExportedClassifier
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ServerMetadataResponse
from guard.protocol.tensors import add_output
from tests.integration.sidecar.conftest import (
    Client,
    Fault,
    Floats,
    Launcher,
    Sidecar,
    Upstream,
    connected,
    decisions,
    eventually,
    free_port,
    infer_request,
    pairs,
)

BINARY = bytes(range(256))


@pytest.fixture(scope="module")
def own_tower(launch: Launcher, exported: Path, served_profile: Path, running_upstream: Upstream) -> Iterator[Sidecar]:
    """Embeds each image once more; refuses what it cannot check."""
    with launch("--upstream", running_upstream.address, "--model", exported, "--profile", served_profile,
                "--pass-headers", "tenant,trace-bin,x-empty", "--pass-parameters", "anything") as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def open_tower(launch: Launcher, exported: Path, served_profile: Path, running_upstream: Upstream) -> Iterator[Sidecar]:
    with launch("--upstream", running_upstream.address, "--model", exported, "--profile", served_profile,
                "--failure-policy", "open") as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def reading(launch: Launcher, served_profile: Path, running_upstream: Upstream) -> Iterator[Sidecar]:
    """Reads the embedding from the reply."""
    with launch("--upstream", running_upstream.address, "--embedding-output", "embedding",
                "--profile", served_profile) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def open_reading(launch: Launcher, served_profile: Path, running_upstream: Upstream) -> Iterator[Sidecar]:
    with launch("--upstream", running_upstream.address, "--embedding-output", "embedding",
                "--profile", served_profile, "--failure-policy", "open") as running:  # fmt: skip
        yield running


@pytest.fixture
def client(own_tower: Sidecar) -> Iterator[Client]:
    with connected(own_tower.address) as connection:
        yield connection


@pytest.fixture
def reader(reading: Sidecar) -> Iterator[Client]:
    with connected(reading.address) as connection:
        yield connection


def unusual(images: Floats) -> bytes:
    """A request as no serialiser would write it: fields out of order."""
    request = infer_request(images, id="7")
    request.parameters["anything"].string_param = "kept"
    name = request.model_name.encode()
    request.model_name = ""
    return request.SerializeToString() + b"\x0a" + bytes([len(name)]) + name


def test_a_request_reaches_the_upstream_server_as_it_was_read(
    client: Client, upstream: Upstream, clean: Floats
) -> None:
    data = unusual(clean[:1])
    assert client.infer(data).response.id == "7"
    assert [ModelInferRequest.FromString(call.data) for call in upstream.inferences()] == [
        ModelInferRequest.FromString(data)
    ]


def test_the_five_other_methods_pass_through(client: Client, upstream: Upstream) -> None:
    assert ServerMetadataResponse.FromString(client.call("ServerMetadata", b"\xba\x3e\x01x")).name == "upstream"
    for method in ("ServerLive", "ServerReady", "ModelReady", "ModelMetadata"):
        client.call(method, b"\xba\x3e\x01y")
    # The sidecar's own readiness probe is an empty message.
    forwarded = [(call.method, call.data) for call in upstream.received if call.data]
    assert forwarded == [
        ("ServerMetadata", b"\xba\x3e\x01x"),
        *((method, b"\xba\x3e\x01y") for method in ("ServerLive", "ServerReady", "ModelReady", "ModelMetadata")),
    ]


def test_an_unmodified_client_works_through_it(own_tower: Sidecar, upstream: Upstream, clean: Floats) -> None:
    tensor = triton.InferInput("image", [2, *clean.shape[1:]], "FP32")
    tensor.set_data_from_numpy(clean[:2])
    with triton.InferenceServerClient(own_tower.address) as connection:
        assert connection.is_server_live()
        assert connection.is_server_ready()
        assert connection.is_model_ready("classifier")
        assert connection.get_server_metadata().name == "upstream"
        assert connection.get_model_metadata("classifier").platform == "fake"
        result = connection.infer("classifier", [tensor], headers={"tenant": "blue"})
    np.testing.assert_allclose(result.as_numpy("logits"), upstream.classify.run(clean[:2])[1], atol=1e-4)
    assert result.as_numpy("guard_decision").shape == (2,)
    assert ("tenant", "blue") in upstream.inferences()[0].metadata


def test_metadata_passes_both_ways(client: Client, upstream: Upstream, clean: Floats) -> None:
    sent = (("tenant", "blue"), ("tenant", "green"), ("trace-bin", BINARY), ("x-empty", ""))
    upstream.initial = (("region", "north"), ("region", "south"), ("start-bin", BINARY))
    upstream.trailing = (("cost", "3"), ("cost", "4"), ("end-bin", BINARY[::-1]))
    reply = client.infer(infer_request(clean[:1]), metadata=sent)
    arrived = upstream.inferences()[0].metadata
    assert [pair for pair in arrived if pair[0] in {"tenant", "trace-bin", "x-empty"}] == list(sent)
    assert [pair for pair in reply.initial if pair[0] in {"region", "start-bin"}] == list(upstream.initial)
    assert [pair for pair in reply.trailing if pair[0] in {"cost", "end-bin"}] == list(upstream.trailing)
    assert dict(reply.trailing)["guard-decision"] == reply.decision


@pytest.mark.parametrize(
    "code",
    [code for code in grpc.StatusCode if code not in {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}],
    ids=lambda code: code.name,
)
def test_an_error_passes_with_code_details_and_trailers(
    client: Client, upstream: Upstream, clean: Floats, code: grpc.StatusCode
) -> None:
    upstream.fault = Fault(code, "upstream says: no — really", (("why", "because"), ("why-bin", BINARY)))
    error = client.refused(infer_request(clean[:1]))
    assert error.code() is code
    assert error.details() == "upstream says: no — really"
    trailing = [(item.key, item.value) for item in error.trailing_metadata()]
    assert {("why", "because"), ("why-bin", BINARY)} <= set(trailing)


def test_a_deadline_is_passed_on_as_it_is(client: Client, upstream: Upstream, clean: Floats) -> None:
    client.infer(infer_request(clean[:1]), timeout=500)
    client.infer(infer_request(clean[:1]), timeout=50)
    long, short = (call.remaining for call in upstream.inferences())
    assert long is not None
    assert short is not None
    # Each hop rounds up, by a hundredth at most.
    assert 25 < short <= 51 < long <= 510


def test_no_deadline_stays_none(client: Client, upstream: Upstream, clean: Floats) -> None:
    client.infer(infer_request(clean[:1]), timeout=None)
    assert [call.remaining for call in upstream.inferences()] == [None]


def test_a_cancelled_request_is_cancelled_upstream(
    client: Client, own_tower: Sidecar, upstream: Upstream, clean: Floats
) -> None:
    upstream.open.clear()
    call = client.method("ModelInfer").future(infer_request(clean[:1]).SerializeToString())
    eventually(lambda: bool(upstream.inferences()), "the request reaching the upstream server")
    call.cancel()
    eventually(upstream.cancelled.is_set, "the cancellation reaching the upstream server")
    eventually(lambda: own_tower.metric("guard_active_requests") == 0, "the request ending")
    assert own_tower.metric("guard_unchecked_total", model="classifier", reason="cancelled") >= 1


def test_fewer_embeddings_than_images_leave_none_unscreened(reader: Client, upstream: Upstream, clean: Floats) -> None:
    upstream.answer = lambda _: reply_with(np.eye(1, 16))
    error = reader.refused(infer_request(clean[:3]))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "1 embeddings for 3 images" in error.details()


def test_its_own_tower_tags_replies(client: Client, upstream: Upstream, clean: Floats, triggered: Floats) -> None:
    on_clean, on_triggered = decisions(client, clean[:30]), decisions(client, triggered[:30])
    assert list(on_clean).count("pass") >= 24
    assert list(on_triggered).count("flag") >= 24
    assert len(upstream.inferences()) == 60


def test_its_own_tower_decides_each_row_of_a_batch(client: Client, upstream: Upstream, clean: Floats) -> None:
    reply = client.infer(infer_request(clean[:3]))
    assert reply.outputs == ["logits", "guard_decision", "guard_score", "guard_p_value", "guard_decided_by"]
    assert (
        ModelInferResponse.FromString(upstream.logits(infer_request(clean[:3]).SerializeToString())).outputs[0]
        == reply.response.outputs[0]
    )


def unreadable(images: Floats) -> ModelInferRequest:
    request = infer_request(images[:1])
    request.inputs[0].datatype = "FP64"
    return request


def answer_anything(_: bytes) -> bytes:
    return ModelInferResponse(model_name="classifier").SerializeToString()


def test_an_input_that_it_cannot_read_is_refused_under_closed(
    client: Client, upstream: Upstream, clean: Floats
) -> None:
    upstream.answer = answer_anything
    error = client.refused(unreadable(clean))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "could not be checked: input 'image' is 'FP64'" in error.details()


def test_an_input_that_it_cannot_read_is_served_unchecked_under_open(
    open_tower: Sidecar, upstream: Upstream, clean: Floats
) -> None:
    upstream.answer = answer_anything
    with connected(open_tower.address) as client:
        reply = client.infer(unreadable(clean))
    assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "input_unreadable")


def test_bytes_that_are_no_request_do_not_reach_the_upstream_server(client: Client, upstream: Upstream) -> None:
    assert client.refused(b"\xff\xff").code() is grpc.StatusCode.INVALID_ARGUMENT
    assert upstream.inferences() == []


@pytest.mark.parametrize("answer", [b"\xff\xff", b"\xba\x3e\x03abc"], ids=["no reply", "a field that nobody knows"])
def test_a_reply_that_cannot_be_read_whole_is_unchecked(
    client: Client, open_tower: Sidecar, upstream: Upstream, clean: Floats, answer: bytes
) -> None:
    upstream.answer = lambda _: answer
    error = client.refused(infer_request(clean[:1]))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "protocol_unknown"
    with connected(open_tower.address) as connection:
        data, call = connection.method("ModelInfer").with_call(infer_request(clean[:1]).SerializeToString(), timeout=60)
    assert data == answer
    assert dict(pairs(call.trailing_metadata()))["guard-decision"] in {"unchecked", "flag"}


def test_another_model_is_refused_under_closed(client: Client, upstream: Upstream, clean: Floats) -> None:
    error = client.refused(infer_request(clean[:1], model_name="other"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == "guard: there is no profile of this model"
    assert len(upstream.inferences()) <= 1


def test_another_model_is_served_unchecked_under_open(open_tower: Sidecar, upstream: Upstream, clean: Floats) -> None:
    data = infer_request(clean[:1], model_name="other").SerializeToString()
    with connected(open_tower.address) as client:
        reply = client.infer(data)
    assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "model_unknown")
    assert [call.data for call in upstream.inferences()] == [data]


def test_the_embedding_of_the_reply_is_read(
    reader: Client, upstream: Upstream, clean: Floats, triggered: Floats
) -> None:
    upstream.answer = upstream.with_embedding
    assert list(decisions(reader, clean[:30])).count("pass") >= 24
    assert list(decisions(reader, triggered[:30])).count("flag") >= 24


def test_both_sources_of_embeddings_give_the_same_scores(
    reader: Client, client: Client, upstream: Upstream, clean: Floats
) -> None:
    upstream.answer = upstream.with_embedding
    scores = [
        np.frombuffer(connection.infer(infer_request(clean[:8])).response.raw_output_contents[-1], np.float32)
        for connection in (reader, client)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


def test_without_listed_outputs_the_request_stays_and_all_outputs_are_kept(
    reader: Client, upstream: Upstream, clean: Floats
) -> None:
    upstream.answer = upstream.with_embedding
    data = unusual(clean[:1])
    assert reader.infer(data).outputs == ["logits", "embedding"]
    assert [call.data for call in upstream.inferences()] == [data]


def test_an_embedding_that_was_not_asked_for_is_added_and_stripped(
    reader: Client, upstream: Upstream, clean: Floats
) -> None:
    upstream.answer = upstream.with_embedding
    request = infer_request(clean[:1])
    request.outputs.add(name="logits")
    reply = reader.infer(request)
    sent = ModelInferRequest.FromString(upstream.inferences()[0].data)
    assert [output.name for output in sent.outputs] == ["logits", "embedding"]
    assert reply.outputs == ["logits"]
    assert len(reply.response.raw_output_contents) == 1
    np.testing.assert_allclose(
        np.frombuffer(reply.response.raw_output_contents[0], np.float32),
        upstream.classify.run(clean[:1])[1][0],
        atol=1e-4,
    )
    assert reply.decision in {"pass", "flag"}


def test_an_embedding_that_was_asked_for_is_kept(reader: Client, upstream: Upstream, clean: Floats) -> None:
    upstream.answer = upstream.with_embedding
    request = infer_request(clean[:1])
    for name in ("embedding", "logits"):
        request.outputs.add(name=name)
    data = request.SerializeToString()
    assert reader.infer(data).outputs == ["embedding", "logits"]
    assert upstream.inferences()[0].data == data


def reply_with(values: Any, shape: list[int] | None = None) -> bytes:
    response = ModelInferResponse(model_name="classifier")
    add_output(response, "embedding", np.asarray(values, np.float32), raw=True)
    if shape is not None:
        response.outputs[0].shape[:] = shape
    return response.SerializeToString()


UNUSABLE = {
    "none": answer_anything(b""),
    "another length": reply_with(np.ones((1, 15))),
    "zero": reply_with(np.zeros((1, 16))),
    "NaN": reply_with(np.full((1, 16), np.nan)),
    "no dimensions": reply_with([1.0], []),
    "negative dimensions": reply_with(np.ones((1, 16)), [-1, -16]),
    "no rows": reply_with(np.ones((0, 16))),
    "more rows than images": reply_with(np.eye(2, 16)),
    "no message": b"\xff\xff",
}


@pytest.mark.parametrize("data", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_reply_without_a_usable_embedding_is_refused_under_closed(
    reader: Client, upstream: Upstream, clean: Floats, data: bytes
) -> None:
    upstream.answer = lambda _: data
    error = reader.refused(infer_request(clean[:1]))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "carries no usable embedding" in error.details()


@pytest.mark.parametrize("name", [name for name in UNUSABLE if name != "no message"])
def test_a_reply_without_a_usable_embedding_is_served_unchecked_under_open(
    open_reading: Sidecar, upstream: Upstream, clean: Floats, name: str
) -> None:
    upstream.answer = lambda _: UNUSABLE[name]
    with connected(open_reading.address) as client:
        reply = client.infer(infer_request(clean[:1]))
    assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "embedding_missing")


def test_without_screening_replies_are_unchecked_and_served(
    launch: Launcher, served_profile: Path, upstream: Upstream, clean: Floats
) -> None:
    arguments = ("--upstream", upstream.address, "--embedding-output", "embedding", "--profile", served_profile)
    with launch(*arguments, "--no-screening") as sidecar, connected(sidecar.address) as client:
        reply = client.infer(infer_request(clean[:1]))
        assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "disabled")


def test_shadow_mode_leaves_the_bytes_of_the_reply_alone(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, clean: Floats
) -> None:
    upstream.answer = lambda data: b"\xba\x3e\x03abc" + upstream.logits(data)
    arguments = ("--upstream", upstream.address, "--model", exported, "--profile", served_profile, "--mode", "shadow")
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        request = infer_request(clean[:3]).SerializeToString()
        assert client.infer(request).data == upstream.answer(request)
        eventually(
            lambda: sidecar.metric("guard_images_total", model="classifier", decision="pass") > 0,
            "the check, for which the reply does not wait",
        )


def test_shadow_mode_strips_the_embedding_and_checks_it_all_the_same(
    launch: Launcher, served_profile: Path, upstream: Upstream, clean: Floats
) -> None:
    upstream.answer = upstream.with_embedding
    arguments = ("--upstream", upstream.address, "--embedding-output", "embedding", "--profile", served_profile)
    request = infer_request(clean[:1])
    request.outputs.add(name="logits")
    with launch(*arguments, "--mode", "shadow") as sidecar, connected(sidecar.address) as client:
        reply = client.infer(request)
        assert reply.outputs == ["logits"]
        assert not reply.response.parameters
        eventually(
            lambda: (
                sidecar.metric("guard_images_total", model="classifier", decision="unchecked") == 0
                and sum(
                    sidecar.metric("guard_images_total", model="classifier", decision=found)
                    for found in ("pass", "flag")
                )
                == 1
            ),
            "the check",
        )


def health(client: Client, service: str) -> Any:
    stub = health_pb2_grpc.HealthStub(client.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status


def test_an_upstream_server_that_is_away_is_named_and_found_again(
    launch: Launcher, exported: Path, served_profile: Path, classify: ExportedClassifier, clean: Floats
) -> None:
    states, port = health_pb2.HealthCheckResponse, free_port()
    arguments = ("--upstream", f"127.0.0.1:{port}", "--model", exported, "--profile", served_profile)
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        error = client.refused(infer_request(clean[:1]))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert f"the upstream server 127.0.0.1:{port} cannot be reached" in error.details()
        with pytest.raises(grpc.RpcError) as caught:
            client.call("ServerReady")
        refused: Any = caught.value
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: bool(health(client, SERVICE) == states.NOT_SERVING), "health saying so")
        assert health(client, "") == states.SERVING
        assert sidecar.metric("guard_ready") == 0
        with Upstream(classify).running(port):
            eventually(lambda: bool(health(client, SERVICE) == states.SERVING), "health recovering")
            assert sidecar.metric("guard_ready") == 1
            assert client.infer(infer_request(clean[:1])).decision in {"pass", "flag"}
        eventually(lambda: bool(health(client, SERVICE) == states.NOT_SERVING), "health noticing the end")


def test_an_upstream_server_that_is_not_ready_makes_the_service_not_serving(
    own_tower: Sidecar, upstream: Upstream
) -> None:
    states = health_pb2.HealthCheckResponse
    with connected(own_tower.address) as client:
        upstream.ready = False
        eventually(lambda: bool(health(client, SERVICE) == states.NOT_SERVING), "health following")
        upstream.ready = True
        eventually(lambda: bool(health(client, SERVICE) == states.SERVING), "health recovering")


def test_a_sidecar_that_waits_for_its_upstream_server_is_known_and_not_serving(
    launch: Launcher, exported: Path, served_profile: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"127.0.0.1:{silent.getsockname()[1]}"
        arguments = ("--upstream", upstream, "--model", exported, "--profile", served_profile)
        with launch(*arguments) as sidecar, connected(sidecar.address) as client:
            assert health(client, SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING


def test_screening_that_takes_too_long_is_a_timeout(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, clean: Floats
) -> None:
    arguments = ("--upstream", upstream.address, "--model", exported, "--profile", served_profile)
    with launch(*arguments, "--timeout", "1e-9") as sidecar, connected(sidecar.address) as client:
        error = client.refused(infer_request(clean[:1]))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "guard: the request could not be checked in time"
        assert len(upstream.inferences()) == 1
        eventually(
            lambda: sidecar.metric("guard_unchecked_total", model="classifier", reason="timeout") == 1,
            "counting the timeout",
        )
