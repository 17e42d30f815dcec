"""Streamed inferences are screened message by message, in the dialects of Triton and of MLServer."""

import queue
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray

from guard.classifiers import ExportedClassifier
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from guard.protocol.tensors import add_output
from guard.testing import InferenceServer
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Floats,
    Launcher,
    Sidecar,
    connected,
    eventually,
    infer_request,
    pairs,
)

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
BACKDOOR = "guard: the input looks like a backdoor trigger"


class Server(InferenceServer):
    """Answers each message `replies` times; or as `script` does, if there is one."""

    def __init__(
        self, classify: ExportedClassifier, *, dialect: Literal["triton", "mlserver"] = "triton", name: str = "triton"
    ) -> None:
        self.classify = classify
        super().__init__(self._outputs, dialect=dialect, name=name)

    def reset(self) -> None:
        super().reset()
        self.replies = 1
        self.script: Callable[[Iterator[bytes]], Iterable[bytes]] | None = None

    def _outputs(self, inputs: Mapping[str, NDArray[Any]]) -> Any:
        embeddings, logits = self.classify.run(inputs["image"])
        outputs = {"logits": logits, "embedding": embeddings}
        return outputs if self.replies == 1 else (outputs for _ in range(self.replies))

    def _stream(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        if self.script is None:
            yield from super()._stream(messages, context)
        else:
            yield from self.script(messages)

    @property
    def inferred(self) -> list[str]:
        return [ModelInferRequest.FromString(call.data).id for call in self.received if "Infer" in call.method]


def served(**more: Any) -> Any:
    @pytest.fixture(scope="module")
    def running(classify: ExportedClassifier) -> Iterator[Server]:
        with Server(classify, **more) as server:
            yield server

    return running


tritons, mlservers = served(), served(dialect="mlserver", name="mlserver")


@pytest.fixture
def server(tritons: Server) -> Server:
    tritons.reset()
    return tritons


@pytest.fixture
def mlserver(mlservers: Server) -> Server:
    mlservers.reset()
    return mlservers


@dataclass(frozen=True)
class Start:
    launch: Launcher
    exported: Path
    profile: Path

    def __call__(self, server: Server, *arguments: str, reading: bool = False) -> Any:
        source = ("--embedding-output", "embedding") if reading else ("--model", self.exported)
        return self.launch("--upstream", server.address, "--profile", self.profile, *source, *arguments)


@pytest.fixture(scope="module")
def start(launch: Launcher, exported: Path, served_profile: Path) -> Start:
    return Start(launch, exported, served_profile)


@pytest.fixture(scope="module")
def block(start: Start, tritons: Server) -> Iterator[Sidecar]:
    with start(tritons, "--mode", "block") as running:
        yield running


@pytest.fixture(scope="module")
def tag(start: Start, tritons: Server) -> Iterator[Sidecar]:
    """Checks while the upstream server works."""
    with start(tritons, "--mode", "tag", "--failure-policy", "open") as running:
        yield running


@pytest.fixture(scope="module")
def reading(start: Start, tritons: Server) -> Iterator[Sidecar]:
    with start(tritons, "--mode", "block", reading=True) as running:
        yield running


@pytest.fixture(scope="module")
def flagged(classify: ExportedClassifier, profile: Profile, triggered: Floats) -> Floats:
    return triggered[profile.detector().score(classify.run(triggered)[0]).p_values < 0.01]


@pytest.fixture(scope="module")
def passed(classify: ExportedClassifier, profile: Profile, clean: Floats) -> Floats:
    return clean[profile.detector().score(classify.run(clean)[0]).p_values > 0.1]


def request(images: Floats, request_id: str = "", **more: Any) -> bytes:
    return infer_request(images, id=request_id, **more).SerializeToString()


def exchange(sidecar: Sidecar, messages: Iterable[bytes], **more: Any) -> list[bytes]:
    with connected(sidecar.address) as client:
        return list(client.channel.stream_stream(STREAM)(iter(messages), timeout=WAIT_SECONDS, **more))


def failure(sidecar: Sidecar, messages: Iterable[bytes], **more: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        exchange(sidecar, messages, **more)
    return caught.value


def envelopes(replies: Iterable[bytes]) -> list[ModelStreamInferResponse]:
    return [ModelStreamInferResponse.FromString(reply) for reply in replies]


def decision(response: ModelInferResponse) -> str:
    return str(response.parameters["guard_decision"].string_param)


def reason(response: ModelInferResponse) -> str:
    return str(response.parameters["guard_reason"].string_param)


class Conversation:
    """tritonclient's stream, which calls back."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._client = triton.InferenceServerClient(sidecar.address)
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def __enter__(self) -> Self:
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream()
        self._client.close()

    def send(self, images: Floats, request_id: str, **more: Any) -> None:
        tensor = triton.InferInput("image", list(images.shape), "FP32").set_data_from_numpy(images)
        self._client.async_stream_infer("classifier", [tensor], request_id=request_id, **more)

    def answer(self) -> tuple[Any, Any]:
        return self._answers.get(timeout=WAIT_SECONDS)


def test_a_flagged_message_is_refused_and_the_stream_goes_on(
    block: Sidecar, server: Server, flagged: Floats, passed: Floats
) -> None:
    with Conversation(block) as stream:
        for index, images in enumerate((passed[:1], flagged[:1], passed[1:2], flagged[1:3])):
            stream.send(images, str(index))
            result, error = stream.answer()
            if index % 2:
                assert result is None
                assert error.message().startswith(BACKDOOR)
            else:
                np.testing.assert_allclose(result.as_numpy("logits"), server.classify.run(images)[1], atol=1e-4)
                assert decision(result.get_response()) == "pass"
                assert result.get_response().id == str(index)
    # What was refused has no answer: it was never asked.
    assert server.inferred == ["0", "2"]


def test_without_ids_answers_and_refusals_keep_the_order_of_the_requests(
    block: Sidecar, server: Server, flagged: Floats, passed: Floats
) -> None:
    images = [passed[:1], flagged[:1], flagged[1:2], passed[1:2], flagged[2:3]]
    replies = envelopes(exchange(block, [request(image) for image in images]))
    assert [bool(reply.error_message) for reply in replies] == [False, True, True, False, True]
    assert len(server.inferred) == 2


def test_a_refusal_says_which_request_it_answers(block: Sidecar, server: Server, flagged: Floats) -> None:  # noqa: ARG001
    (reply,) = envelopes(exchange(block, [request(flagged[:1], "seven")]))
    assert reply.error_message == BACKDOOR
    assert (reply.infer_response.id, reply.infer_response.model_name) == ("seven", "classifier")
    assert not reply.infer_response.outputs


def test_a_client_that_wants_status_gets_status(
    block: Sidecar,
    server: Server,  # noqa: ARG001
    flagged: Floats,
) -> None:
    error = failure(block, [request(flagged[:1], "1")], metadata=(("triton_grpc_error", "true"),))
    assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, BACKDOOR)
    assert dict(pairs(error.trailing_metadata()))["guard-decision"] == "flag"


def test_every_reply_says_what_its_request_was_found_to_be(
    tag: Sidecar, server: Server, flagged: Floats, passed: Floats
) -> None:
    images = [passed[:1], flagged[:1], passed[1:2], np.concatenate([passed[2:3], flagged[2:3]])]
    expected = ["pass", "flag", "pass", "flag"]
    by_id = envelopes(exchange(tag, [request(image, f"r{index}") for index, image in enumerate(images)]))
    by_order = envelopes(exchange(tag, [request(image) for image in images]))
    for replies in (by_id, by_order):
        assert [decision(reply.infer_response) for reply in replies] == expected
    batch = by_id[-1].infer_response
    assert [output.name for output in batch.outputs][-4:-1] == ["guard_decision", "guard_score", "guard_p_value"]
    assert len(batch.outputs) == len(batch.raw_output_contents)
    assert len(server.inferred) == 8


def test_ids_hold_where_the_server_answers_in_another_order(
    tag: Sidecar, server: Server, flagged: Floats, passed: Floats
) -> None:
    def backwards(messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in reversed(list(messages)):
            yield ModelStreamInferResponse(
                infer_response=ModelInferResponse.FromString(server.respond(message))
            ).SerializeToString()

    server.script = backwards
    images = [passed[:1], flagged[:1], passed[1:2]]
    replies = envelopes(exchange(tag, [request(image, f"r{index}") for index, image in enumerate(images)]))
    assert [(reply.infer_response.id, decision(reply.infer_response)) for reply in replies] == [
        ("r2", "pass"),
        ("r1", "flag"),
        ("r0", "pass"),
    ]


@pytest.mark.parametrize("count", [0, 3])
def test_several_replies_or_none_to_a_request_survive(
    tag: Sidecar, server: Server, flagged: Floats, passed: Floats, count: int
) -> None:
    server.replies = count
    with Conversation(tag) as stream:
        for request_id, images, expected in (("a", passed[:1], "pass"), ("b", flagged[:1], "flag")):
            stream.send(images, request_id, enable_empty_final_response=True)
            responses = [stream.answer()[0].get_response() for _ in range(count + 1)]
            assert [response.id for response in responses] == [request_id] * (count + 1)
            assert [decision(response) for response in responses[:-1]] == [expected] * count
            finals = [response.parameters["triton_final_response"].bool_param for response in responses]
            assert finals == [False] * count + [True]
            assert "guard_decision" not in responses[-1].parameters


def test_several_replies_without_ids_get_the_worst_that_they_may_be(
    tag: Sidecar, server: Server, flagged: Floats, passed: Floats
) -> None:
    def together(received: Iterator[bytes]) -> Iterator[bytes]:
        """Both are asked before one is answered, and nothing says which an answer is of."""
        for message in [next(received), next(received)]:
            for final in (False, True):
                reply = ModelInferResponse.FromString(server.respond(message))
                reply.parameters["triton_final_response"].bool_param = final
                yield ModelStreamInferResponse(infer_response=reply).SerializeToString()

    server.script = together
    found = [
        decision(reply.infer_response)
        for reply in envelopes(exchange(tag, [request(passed[:1]), request(flagged[:1])]))
    ]
    assert len(found) == 4
    assert found[-1] == "flag"
    assert found.count("flag") >= 2


def test_a_reply_to_no_request_follows_the_failure_policy(
    block: Sidecar, tag: Sidecar, server: Server, passed: Floats
) -> None:
    def strange(messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            reply = ModelInferResponse.FromString(server.respond(message))
            reply.id = "of somebody else"
            yield ModelStreamInferResponse(infer_response=reply).SerializeToString()

    server.script = strange
    (closed,) = envelopes(exchange(block, [request(passed[:1], "mine")]))
    assert "could not be matched to a request" in closed.error_message
    assert not closed.infer_response.outputs
    (opened,) = envelopes(exchange(tag, [request(passed[:1], "mine")]))
    assert (decision(opened.infer_response), reason(opened.infer_response)) == ("unchecked", "reply_unmatched")


def test_errors_of_the_server_pass_as_they_are(tag: Sidecar, server: Server, passed: Floats) -> None:
    error = ModelStreamInferResponse(error_message="no such model").SerializeToString()
    server.script = lambda messages: (error for _ in messages)
    assert exchange(tag, [request(passed[:1], "1")]) == [error]


def test_a_message_that_is_no_request_is_refused_and_not_forwarded(
    block: Sidecar, server: Server, passed: Floats
) -> None:
    replies = envelopes(exchange(block, [b"\xff\xff", request(passed[:1], "1")]))
    assert {reply.error_message for reply in replies} == {
        "guard: the message is not a ModelInferRequest, or has fields that the protocol does not have",
        "",
    }
    assert server.inferred == ["1"]


def test_the_embedding_of_each_reply_is_checked_and_a_flagged_one_is_withheld(
    reading: Sidecar, server: Server, flagged: Floats, passed: Floats
) -> None:
    server.replies = 2
    with Conversation(reading) as stream:
        for images, is_flagged in ((passed[:1], False), (flagged[:1], True), (passed[1:2], False)):
            stream.send(images, "", enable_empty_final_response=True)
            answers = [stream.answer() for _ in range(2)]
            for result, error in answers:
                assert (error is not None) == is_flagged
                if result is not None:
                    assert decision(result.get_response()) == "pass"
                    assert result.as_numpy("embedding") is not None
            final = stream.answer()[0].get_response()
            assert final.parameters["triton_final_response"].bool_param


def test_an_embedding_that_was_not_asked_for_is_added_and_stripped(
    reading: Sidecar, server: Server, passed: Floats
) -> None:
    made = infer_request(passed[:1], id="1")
    made.outputs.add(name="logits")
    (reply,) = envelopes(exchange(reading, [made.SerializeToString()]))
    # Between them come the sidecar's own questions whether the server is ready.
    received = next(each for each in reversed(server.received) if each.data)
    assert received.outputs == ["logits", "embedding"]
    assert received.data.startswith(made.SerializeToString())
    assert [output.name for output in reply.infer_response.outputs] == ["logits"]
    assert len(reply.infer_response.raw_output_contents) == 1
    assert decision(reply.infer_response) == "pass"


def test_a_reply_without_its_embedding_is_refused(reading: Sidecar, server: Server, passed: Floats) -> None:
    bare = ModelInferResponse(id="1")
    add_output(bare, "logits", passed[0, 0], raw=True)
    server.script = lambda messages: (
        ModelStreamInferResponse(infer_response=bare).SerializeToString() for _ in messages
    )
    (reply,) = envelopes(exchange(reading, [request(passed[:1], "1")]))
    assert "carries no usable embedding" in reply.error_message
    assert not reply.infer_response.outputs


def test_in_mlservers_dialect_replies_are_annotated_and_a_flagged_message_ends_the_stream(
    start: Start, mlserver: Server, flagged: Floats, passed: Floats
) -> None:
    with start(mlserver, "--mode", "block") as sidecar:
        replies = exchange(sidecar, [request(passed[i : i + 1], str(i)) for i in range(3)])
        assert [decision(ModelInferResponse.FromString(reply)) for reply in replies] == ["pass"] * 3
        before = len(mlserver.inferred)
        error = failure(sidecar, [request(passed[:1], "1"), request(flagged[:1], "2")])
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, BACKDOOR)
        assert dict(pairs(error.trailing_metadata()))["guard-decision"] == "flag"
        assert "2" not in mlserver.inferred[before:]


def test_in_mlservers_dialect_ids_say_nothing_and_the_order_holds(
    start: Start, mlserver: Server, flagged: Floats, passed: Floats
) -> None:
    def mlservers_way(messages: Iterator[bytes]) -> Iterator[bytes]:
        first = None
        for message in messages:
            reply = ModelInferResponse.FromString(mlserver.respond(message))
            first = first or reply.id
            reply.id = first
            yield reply.SerializeToString()

    mlserver.script = mlservers_way
    with start(mlserver, "--mode", "tag", "--failure-policy", "open") as sidecar:
        images = [passed[:1], flagged[:1], passed[1:2]]
        replies = exchange(sidecar, [request(image, str(index)) for index, image in enumerate(images)])
    assert [decision(ModelInferResponse.FromString(reply)) for reply in replies] == ["pass", "flag", "pass"]


def test_a_server_of_unknown_name_is_refused_for_with_status_unless_the_dialect_is_set(
    start: Start, classify: ExportedClassifier, flagged: Floats
) -> None:
    with Server(classify, name="nameless") as nameless:
        with start(nameless, "--mode", "block") as sidecar:
            assert failure(sidecar, [request(flagged[:1], "1")]).code() is grpc.StatusCode.PERMISSION_DENIED
        with start(nameless, "--mode", "block", "--stream-dialect", "triton") as sidecar:
            assert envelopes(exchange(sidecar, [request(flagged[:1], "1")]))[0].error_message == BACKDOOR


def test_shadow_mode_leaves_the_bytes_alone_and_counts(
    start: Start, server: Server, flagged: Floats, passed: Floats
) -> None:
    odd = b"\xba\x3e\x03abc"
    server.script = lambda messages: (
        odd + ModelStreamInferResponse(infer_response=ModelInferResponse(id="x")).SerializeToString() for _ in messages
    )
    with start(server, "--mode", "shadow") as sidecar:
        assert exchange(sidecar, [request(passed[:1]), request(flagged[:1])]) == [odd + b"\x12\x03\x1a\x01x"] * 2
        for found in ("pass", "flag"):
            eventually(partial(counted, sidecar, found), "counting")


def counted(sidecar: Sidecar, found: str) -> bool:
    return sidecar.metric("guard_images_total", model="classifier", decision=found) == 1


def test_a_cancelled_stream_is_cancelled_upstream(block: Sidecar, server: Server, passed: Floats) -> None:
    server.open.clear()
    with connected(block.address) as client:
        call = client.channel.stream_stream(STREAM)(iter([request(passed[:1], "1")]))
        eventually(lambda: bool(server.inferred), "the request reaching the upstream server")
        call.cancel()
        eventually(server.cancelled.is_set, "the cancellation reaching the upstream server")
    eventually(lambda: block.metric("guard_active_requests") == 0, "the stream ending")
