import doctest
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

import guard.testing.server
from guard.errors import RequestError, UsageError
from guard.protocol.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerReadyResponse,
)
from guard.testing import Fault, InferenceServer
from guard.testing.dialects import field

SERVICE = "/inference.GRPCInferenceService/"
SECONDS = 30
Tensors = Mapping[str, NDArray[Any]]
VALUES = {
    "BOOL": np.array([[True, False, True]]),
    **{f"INT{bits}": np.array([[-3, 0, 100]], f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.array([[3, 0, 250]], f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.array([[-0.5, np.inf, 3.25]], f"float{bits}") for bits in (16, 32, 64)},
    "BYTES": np.array([[b"", b"\x00\xff", b"text"]], object),
}
FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def echo(inputs: Tensors) -> Tensors:
    return inputs


@pytest.fixture
def server() -> Iterator[InferenceServer]:
    with InferenceServer(echo) as running:
        yield running


class Wire:
    """Bytes to a server, and back."""

    def __init__(self, server: InferenceServer) -> None:
        self.channel = grpc.insecure_channel(server.address, [("grpc.enable_retries", 0)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, method: str, data: bytes = b"", **more: Any) -> bytes:
        path = method if method.startswith("/") else SERVICE + method
        reply: bytes = self.channel.unary_unary(path)(data, timeout=SECONDS, **more)
        return reply

    def infer(self, request: ModelInferRequest | bytes, **more: Any) -> ModelInferResponse:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return ModelInferResponse.FromString(self.call("ModelInfer", data, **more))

    def refused(self, request: ModelInferRequest | bytes, method: str = "ModelInfer", **more: Any) -> Any:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, data, **more)
        return caught.value

    def stream(self, requests: list[ModelInferRequest], **more: Any) -> list[bytes]:
        call = self.channel.stream_stream(SERVICE + "ModelStreamInfer")
        return list(call(iter([request.SerializeToString() for request in requests]), timeout=SECONDS, **more))


def arrived(server: InferenceServer, count: int) -> None:
    deadline = time.monotonic() + SECONDS
    while len(server.received) < count:
        assert time.monotonic() < deadline, f"{count} calls did not arrive"
        time.sleep(0.01)


def raw_request(values: NDArray[Any] | None = None, **more: Any) -> ModelInferRequest:
    array = np.array([1.0, 2.0], np.float32) if values is None else values
    tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=array.shape)
    return ModelInferRequest(**{"model_name": "m", "inputs": [tensor], "raw_input_contents": [array.tobytes()], **more})


def typed_request() -> ModelInferRequest:
    request = raw_request(raw_input_contents=[])
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    return request


def test_the_example_in_the_docstring_works() -> None:
    result = doctest.testmod(guard.testing.server)
    assert (result.failed, result.attempted > 5) == (0, True)


@pytest.mark.parametrize("datatype", VALUES)
def test_every_datatype_passes_in_raw_form(server: InferenceServer, datatype: str) -> None:
    sent = VALUES[datatype]
    tensor = triton.InferInput("x", sent.shape, datatype).set_data_from_numpy(sent)
    with triton.InferenceServerClient(server.address) as client:
        got = client.infer("m", [tensor]).as_numpy("x")
    for array in (got, server.received[-1].inputs["x"]):
        assert array.dtype == sent.dtype
        np.testing.assert_array_equal(array, sent)


@pytest.mark.parametrize("datatype", FIELDS)
def test_every_datatype_passes_in_typed_form(datatype: str) -> None:
    sent = VALUES[datatype]
    request = raw_request(raw_input_contents=[])
    request.inputs[0].datatype, request.inputs[0].shape[:] = datatype, sent.shape
    getattr(request.inputs[0].contents, FIELDS[datatype]).extend(sent.ravel().tolist())
    with InferenceServer(echo, dialect="mlserver") as server, Wire(server) as wire:
        reply = wire.infer(request)
    assert not reply.raw_output_contents
    assert (reply.outputs[0].datatype, list(reply.outputs[0].shape)) == (datatype, [1, 3])
    assert list(getattr(reply.outputs[0].contents, FIELDS[datatype])) == sent.ravel().tolist()


@pytest.mark.parametrize(
    ("dialect", "request_form", "form"),
    [
        ("triton", typed_request, "raw"),
        ("triton", raw_request, "raw"),
        ("mlserver", typed_request, "typed"),
        ("mlserver", raw_request, "raw"),
        ("kserve", typed_request, "typed"),
        ("kserve", raw_request, "raw"),
    ],
)
def test_replies_have_the_form_that_the_dialect_gives_them(
    dialect: Any, request_form: Callable[[], ModelInferRequest], form: str
) -> None:
    with InferenceServer(echo, dialect=dialect) as server, Wire(server) as wire:
        reply = wire.infer(request_form())
    assert bool(reply.raw_output_contents) == (form == "raw")
    assert reply.outputs[0].HasField("contents") == (form == "typed")


def damaged(change: Callable[[ModelInferRequest], object]) -> ModelInferRequest:
    request = raw_request()
    change(request)
    return request


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (b"\xff\xff", "not a ModelInferRequest"),
        (damaged(lambda r: r.raw_input_contents.append(b"")), "2 raw contents for 1 inputs"),
        (damaged(lambda r: r.inputs[0].contents.fp32_contents.append(1)), "both raw and typed"),
        (damaged(lambda r: setattr(r.inputs[0], "datatype", "BF16")), "'BF16'"),
        (damaged(lambda r: r.inputs[0].shape.append(2)), "has 8 bytes; its shape needs 16"),
        (damaged(lambda r: r.inputs[0].shape.__setitem__(slice(None), [-1, -2])), "has the shape [-1, -2]"),
        (damaged(lambda r: r.raw_input_contents.__setitem__(0, b"12345")), "has 5 bytes"),
        (damaged(lambda r: setattr(r.inputs[0], "datatype", "BYTES")), "damaged"),
        (damaged(lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFrom(
            ModelInferRequest().parameters["region"])), "shared memory"),
        (damaged(lambda r: r.outputs.add(name="y")), "there is no output 'y'"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_told_what_is_wrong(
    server: InferenceServer, request_: ModelInferRequest | bytes, told: str
) -> None:
    with Wire(server) as wire:
        error = wire.refused(request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert told in error.details()
    assert len(server.received) == 1


def test_only_the_outputs_that_are_asked_for_come_in_their_order() -> None:
    with InferenceServer(lambda _: {name: np.zeros(2) for name in "abc"}) as server, Wire(server) as wire:
        some = wire.infer(damaged(lambda r: [r.outputs.add(name=name) for name in "ca"]))
        assert [output.name for output in some.outputs] == ["c", "a"]
        assert [output.name for output in wire.infer(raw_request(id="7", model_version="2")).outputs] == ["a", "b", "c"]
    assert [call.outputs for call in server.received] == [["c", "a"], []]


def test_a_reply_echoes_name_version_and_id(server: InferenceServer) -> None:
    with Wire(server) as wire:
        reply = wire.infer(raw_request(id="7", model_version="2"))
    assert (reply.model_name, reply.model_version, reply.id) == ("m", "2", "7")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ZeroDivisionError("oh"), grpc.StatusCode.INTERNAL, "the model raised ZeroDivisionError: oh"),
        (RequestError("too small"), grpc.StatusCode.INVALID_ARGUMENT, "too small"),
    ],
)
def test_what_a_model_raises_is_told_to_the_client(error: Exception, code: grpc.StatusCode, told: str) -> None:
    def model(_: Tensors) -> Tensors:
        raise error

    with InferenceServer(model) as server, Wire(server) as wire:
        caught = wire.refused(raw_request())
    assert (caught.code(), caught.details()) == (code, told)


def test_an_output_that_the_protocol_cannot_carry_is_an_error_of_the_model() -> None:
    with InferenceServer(lambda _: {"z": np.array([1j])}) as server, Wire(server) as wire:
        assert "complex128, which the protocol cannot carry" in wire.refused(raw_request()).details()


def test_several_models_are_served_by_name() -> None:
    models = {"one": lambda _: {"y": np.array([1])}, "two": lambda _: {"y": np.array([2])}}
    with InferenceServer(models) as server, Wire(server) as wire:
        assert wire.infer(raw_request(model_name="two")).raw_output_contents[0][0] == 2
        assert wire.refused(raw_request(model_name="three")).code() is grpc.StatusCode.NOT_FOUND
        ready = [
            ModelReadyResponse.FromString(
                wire.call("ModelReady", ModelReadyRequest(name=name).SerializeToString())
            ).ready
            for name in ("one", "three")
        ]
        assert ready == [True, False]
        assert wire.refused(b"\x0a\x05three", "ModelMetadata").code() is grpc.StatusCode.NOT_FOUND


def test_an_unmodified_client_finds_what_it_asks_a_server() -> None:
    with InferenceServer({"m": echo}, name="mine") as server, triton.InferenceServerClient(server.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("m")
        assert client.get_server_metadata().name == "mine"
        assert client.get_model_metadata("m").name == "m"
        client.load_model("m", config="{}")
        client.unload_model("m")
        (model,) = client.get_model_repository_index().models
        assert (model.name, model.state) == ("m", "READY")
        server.ready = False
        assert not client.is_server_ready()
        assert not client.is_model_ready("m")
    load = next(call for call in server.received if call.method == "RepositoryModelLoad")
    assert b"config" in load.data


def test_the_model_repository_is_that_of_the_dialect() -> None:
    own = "/inference.model_repository.ModelRepositoryService/"
    with InferenceServer({"m": echo}, dialect="kserve") as server, Wire(server) as wire:
        assert wire.call("RepositoryModelLoad", b"\x0a\x01m") == b"\x0a\x01m\x10\x01"
        assert wire.refused(b"", "RepositoryIndex").code() is grpc.StatusCode.UNIMPLEMENTED
    with InferenceServer({"m": echo}, dialect="mlserver") as server, Wire(server) as wire:
        assert wire.call(own + "RepositoryIndex") == wire.call("RepositoryIndex") != b""
        assert wire.call(own + "RepositoryModelLoad", b"\x12\x01m") == b""
    assert server.received[-1].method == own + "RepositoryModelLoad"
    with InferenceServer({"m": echo}) as server, Wire(server) as wire:
        assert wire.refused(b"", own + "RepositoryIndex").code() is grpc.StatusCode.UNIMPLEMENTED


def test_it_says_that_it_is_the_server_whose_dialect_it_speaks() -> None:
    with InferenceServer(echo, dialect="mlserver") as server, triton.InferenceServerClient(server.address) as client:
        assert client.get_server_metadata().name == "mlserver"


def test_it_imports_little_and_numpy_only_when_a_tensor_is_read() -> None:
    code = """
import sys
before = set(sys.modules)
from guard.testing import InferenceServer
loaded = set(sys.modules) - before
assert len(loaded) <= 200, len(loaded)
assert not {"numpy", "onnxruntime", "PIL", "pydantic", "torch"} & loaded
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("size", [0, 127, 128, 16_383, 16_384, 70_000])
def test_envelopes_have_the_length_of_what_is_in_them(size: int) -> None:
    # Field 1 of this message is a string too.
    assert ModelReadyRequest.FromString(field(1, b"x" * size)).name == "x" * size


class Stream:
    """tritonclient's stream, and what it was called back with."""

    def __init__(self, server: InferenceServer, **more: Any) -> None:
        self.client = triton.InferenceServerClient(server.address)
        self.results: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.results.put((result, error)), **more)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_stream()
        self.client.close()

    def send(self, *values: float, **more: Any) -> None:
        array = np.array(values, np.float32)
        self.client.async_stream_infer(
            "m", [triton.InferInput("x", array.shape, "FP32").set_data_from_numpy(array)], **more
        )

    def next(self) -> tuple[Any, Any]:
        return self.results.get(timeout=SECONDS)


def test_tritons_streams_answer_message_by_message_and_go_on_after_an_error(server: InferenceServer) -> None:
    with Stream(server) as stream:
        stream.send(1, 2, request_id="a")
        result, error = stream.next()
        assert error is None
        assert (result.get_response().id, result.as_numpy("x").tolist()) == ("a", [1, 2])
        server.fault = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "no — really")
        stream.send(3)
        assert "no — really" in str(stream.next()[1])
        server.reset()
        stream.send(4)
        assert stream.next()[0].as_numpy("x").tolist() == [4]
    assert [call.method for call in server.received] == ["ModelStreamInfer"]


def test_an_error_in_tritons_streams_names_its_request(server: InferenceServer) -> None:
    with Wire(server) as wire:
        request = raw_request(id="7", outputs=[ModelInferRequest.InferRequestedOutputTensor(name="y")])
        (data,) = wire.stream([request])
    message = service_pb2.ModelStreamInferResponse.FromString(data)
    assert (message.error_message, message.infer_response.id) == ("there is no output 'y'; the model has ['x']", "7")


def test_tritons_streams_end_with_the_status_for_clients_that_ask_for_it(server: InferenceServer) -> None:
    server.fault = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "no", (("why", "because"),))
    with Wire(server) as wire, pytest.raises(grpc.RpcError) as caught:
        wire.stream([raw_request()], metadata=(("triton_grpc_error", "true"),))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("why", "because") in [(item.key, item.value) for item in error.trailing_metadata()]


def count(inputs: Tensors) -> Iterator[Tensors]:
    for number in range(int(inputs["x"][0])):
        yield {"n": np.array([number])}


def test_a_decoupled_model_answers_as_often_as_it_likes() -> None:
    with InferenceServer(count) as server:
        with Stream(server) as stream:
            stream.send(2, enable_empty_final_response=True)
            answers = [stream.next()[0] for _ in range(3)]
            final = [answer.get_response().parameters["triton_final_response"].bool_param for answer in answers]
            assert final == [False, False, True]
            assert [len(answer.get_response().outputs) for answer in answers] == [1, 1, 0]
            stream.send(1)
            assert "triton_final_response" not in stream.next()[0].get_response().parameters
        with Wire(server) as wire:
            assert wire.refused(raw_request()).code() is grpc.StatusCode.UNIMPLEMENTED


def test_mlservers_streams_have_no_envelope_and_end_with_an_error() -> None:
    with InferenceServer(count, dialect="mlserver") as server, Wire(server) as wire:
        replies = wire.stream([raw_request(np.full(1, 2, np.float32), id="a"), raw_request(np.ones(1, np.float32))])
        assert [ModelInferResponse.FromString(reply).id for reply in replies] == ["a", "a", ""]
        server.fault = Fault(grpc.StatusCode.ABORTED, "no")
        with pytest.raises(grpc.RpcError) as caught:
            wire.stream([raw_request()])
        error: Any = caught.value
        assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "no")


def test_kserve_has_no_streams() -> None:
    with InferenceServer(echo, dialect="kserve") as server, Wire(server) as wire:
        with pytest.raises(grpc.RpcError) as caught:
            wire.stream([raw_request()])
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.received[0].method == "ModelStreamInfer"


def test_unknown_methods_are_unimplemented_and_remembered(server: InferenceServer) -> None:
    with Wire(server) as wire:
        assert wire.refused(b"abc", "ModelConfig").code() is grpc.StatusCode.UNIMPLEMENTED
        assert wire.refused(b"def", "/other.Service/Method").code() is grpc.StatusCode.UNIMPLEMENTED
    assert [(call.method, call.data) for call in server.received] == [
        ("ModelConfig", b"abc"),
        ("/other.Service/Method", b"def"),
    ]


def test_more_methods_of_any_arity() -> None:
    def chat(messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            yield message[::-1]

    with InferenceServer(echo, methods={"/a.B/Chat": chat, "ModelConfig": lambda _: [b"config"]}) as server:
        server.trailing = (("cost", "3"),)
        with Wire(server) as wire:
            assert wire.call("ModelConfig", b"m") == b"config"
            assert wire.call("/a.B/Chat", b"abc") == b"cba"
            call = wire.channel.stream_stream("/a.B/Chat")(iter([b"ab", b"cd"]), timeout=SECONDS)
            assert list(call) == [b"ba", b"dc"]
            assert [(item.key, item.value) for item in call.trailing_metadata()] == [("cost", "3")]
            server.fault = Fault(grpc.StatusCode.ABORTED, "no")
            assert wire.refused(b"x", "/a.B/Chat").code() is grpc.StatusCode.ABORTED
    assert [call.data for call in server.received if call.method == "/a.B/Chat"] == [b"abc", b"ab", b"cd", b"x"]


def test_metadata_comes_and_goes(server: InferenceServer) -> None:
    sent = (("tenant", "blue"), ("tenant", "green"), ("trace-bin", b"\x00\xff"))
    server.initial, server.trailing = (("region", "north"),), (("cost-bin", b"\xff\x00"),)
    with Wire(server) as wire:
        _, call = wire.channel.unary_unary(SERVICE + "ModelInfer").with_call(
            raw_request().SerializeToString(), metadata=sent, timeout=SECONDS
        )
        assert ("region", "north") in [(item.key, item.value) for item in call.initial_metadata()]
        assert [(item.key, item.value) for item in call.trailing_metadata()] == [("cost-bin", b"\xff\x00")]
        wire.channel.unary_unary(SERVICE + "ServerLive")(b"")
    assert [pair for pair in server.received[0].metadata if pair[0] in {"tenant", "trace-bin"}] == list(sent)
    assert 0 < (server.received[0].remaining or 0) <= SECONDS + 1
    assert server.received[1].remaining is None


def test_a_fault_is_answered_with_its_trailers(server: InferenceServer) -> None:
    server.fault = Fault(grpc.StatusCode.DATA_LOSS, "gone — really", (("why-bin", b"\xff"),))
    with Wire(server) as wire:
        error = wire.refused(raw_request())
        assert ServerReadyResponse.FromString(wire.call("ServerReady")).ready
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "gone — really")
    assert [(item.key, item.value) for item in error.trailing_metadata()] == [("why-bin", b"\xff")]


def test_calls_wait_while_it_is_not_open(server: InferenceServer) -> None:
    server.open.clear()
    with Wire(server) as wire:
        waiting = wire.channel.unary_unary(SERVICE + "ModelInfer").future(raw_request().SerializeToString())
        arrived(server, 1)
        assert not waiting.done()
        server.open.set()
        assert waiting.result(SECONDS)
    assert not server.cancelled.is_set()


def test_a_waiting_call_that_is_cancelled_is_noticed_and_others_wait_on(server: InferenceServer) -> None:
    server.open.clear()
    with Wire(server) as wire:
        method = wire.channel.unary_unary(SERVICE + "ModelInfer")
        first, second = (method.future(raw_request().SerializeToString()) for _ in range(2))
        arrived(server, 2)
        first.cancel()
        assert server.cancelled.wait(SECONDS)
        assert not second.done()
        server.open.set()
        assert second.result(SECONDS)


def test_wrong_shapes_are_claimed(server: InferenceServer) -> None:
    server.shapes = {"x": (-1, 512)}
    with Wire(server) as wire:
        reply = wire.infer(raw_request())
    assert (list(reply.outputs[0].shape), len(reply.raw_output_contents[0])) == ([-1, 512], 8)


def test_an_answer_may_be_anything_and_may_start_from_the_models(server: InferenceServer) -> None:
    server.answer = lambda data: server.respond(data) + b"\xff"
    with Wire(server) as wire:
        assert wire.call("ModelInfer", raw_request().SerializeToString())[-1] == 255
        assert wire.stream([raw_request()])[0][-1] == 255
        error = wire.refused(damaged(lambda r: r.outputs.add(name="y")))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_dropped_connections_end_calls_as_unavailable_and_the_server_is_back(server: InferenceServer) -> None:
    address = server.address
    with Wire(server) as wire:
        for _ in range(5):
            server.open.clear()
            waiting = wire.channel.unary_unary(SERVICE + "ModelInfer").future(raw_request().SerializeToString())
            arrived(server, 1)
            server.drop_connections()
            error: Any = waiting.exception(SECONDS)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            server.reset()
            assert wire.infer(raw_request(), wait_for_ready=True).outputs
            server.reset()
    assert server.address == address


def test_it_forgets_when_it_is_reset_and_remembers_no_more_than_it_should() -> None:
    with InferenceServer(echo, memory=3) as server, Wire(server) as wire:
        for number in range(5):
            wire.infer(raw_request(id=str(number)))
        assert [ModelInferRequest.FromString(call.data).id for call in server.received] == ["2", "3", "4"]
        server.fault = Fault(grpc.StatusCode.ABORTED)
        server.reset()
        assert server.received == []
        assert wire.infer(raw_request()).outputs


def test_it_listens_on_a_unix_socket(tmp_path: Path) -> None:
    with InferenceServer(echo, address=f"unix:{tmp_path}/s") as server, Wire(server) as wire:
        assert wire.infer(raw_request()).outputs
        server.drop_connections()
        assert wire.infer(raw_request(), wait_for_ready=True).outputs


def test_many_threads_get_their_own_answers(server: InferenceServer) -> None:
    def ask(number: int) -> int:
        return int(np.frombuffer(wire.infer(raw_request(np.full(2, number, "f4"))).raw_output_contents[0], "f4")[1])

    with Wire(server) as wire, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(200))) == list(range(200))
    assert len(server.received) == 200


def test_what_cannot_be_started_says_why(server: InferenceServer) -> None:
    with pytest.raises(UsageError, match="runs already"):
        server.start()
    with pytest.raises(UsageError, match=f"cannot listen on {server.address}"):
        InferenceServer(echo, address=server.address).start()
    with pytest.raises(UsageError, match="no dialect 'torch'"):
        InferenceServer(echo, dialect="torch")  # type: ignore[arg-type]


def test_it_leaves_no_thread_behind_even_with_a_call_that_waits() -> None:
    before = {thread.ident for thread in threading.enumerate()}  # other tests' servers may be running
    with InferenceServer(echo) as server, Wire(server) as wire:
        server.open.clear()
        waiting = wire.channel.unary_unary(SERVICE + "ModelInfer").future(raw_request().SerializeToString())
        arrived(server, 1)
        server.stop()
        assert waiting.exception(SECONDS) is not None
    after = [thread for thread in threading.enumerate() if thread.name.startswith("inference-server")]
    assert [thread.name for thread in after if thread.ident not in before] == []
