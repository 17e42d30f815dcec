"""Methods that the operator lets pass, although guard does not know them, with any number of messages each way."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard.testing import Fault, InferenceServer
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Client,
    Launcher,
    Pairs,
    Sidecar,
    connected,
    eventually,
    pairs,
)

BINARY = bytes(range(256))
ECHO = "/any.Service/Echo"
LIMIT = 8 * 2**20


def echo(messages: Iterator[bytes]) -> Iterable[bytes]:
    """Each message, and at the end how many there were."""
    count = 0
    for message in messages:
        count += 1
        yield message
    yield b"%d" % count


def last(messages: Iterator[bytes]) -> Iterable[bytes]:
    return [b"".join(messages)]


@pytest.fixture(scope="module")
def running_server() -> Iterator[InferenceServer]:
    methods = {ECHO: echo, "/any.Service/Last": last, "ModelConfig": last}
    with InferenceServer(lambda inputs: inputs, dialect="mlserver", methods=methods) as server:
        yield server


@pytest.fixture
def server(running_server: InferenceServer) -> InferenceServer:
    running_server.reset()
    return running_server


@pytest.fixture(scope="module")
def sidecar(
    launch: Launcher, exported: Path, served_profile: Path, running_server: InferenceServer
) -> Iterator[Sidecar]:
    with launch("--upstream", running_server.address, "--model", exported, "--profile", served_profile,
                "--max-message-bytes", str(LIMIT), "--pass-methods", "/any.Service/*,/no.Such/Thing",
                "--pass-headers", "tenant,trace-*") as running:  # fmt: skip
        yield running


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[Client]:
    with connected(sidecar.address) as connection:
        yield connection


def of_method(server: InferenceServer, path: str) -> list[Any]:
    return [call for call in server.received if call.method == path]


@pytest.mark.parametrize("path", ["/any.Service/Last", "/inference.GRPCInferenceService/ModelConfig"])
def test_one_message_each_way(client: Client, server: InferenceServer, path: str) -> None:
    assert client.channel.unary_unary(path)(BINARY, timeout=WAIT_SECONDS) == BINARY
    assert [call.data for call in of_method(server, path.removeprefix("/inference.GRPCInferenceService/"))] == [BINARY]


def test_many_messages_back(client: Client, server: InferenceServer) -> None:  # noqa: ARG001 - it answers
    assert list(client.channel.unary_stream(ECHO)(b"x", timeout=WAIT_SECONDS)) == [b"x", b"1"]


def test_many_messages_there(client: Client, server: InferenceServer) -> None:  # noqa: ARG001
    sent = [b"a", b"", b"bc"]
    assert client.channel.stream_unary("/any.Service/Last")(iter(sent), timeout=WAIT_SECONDS) == b"abc"


def test_many_messages_both_ways_in_order(client: Client, server: InferenceServer) -> None:  # noqa: ARG001
    sent = [b"%d" % i for i in range(200)]
    assert list(client.channel.stream_stream(ECHO)(iter(sent), timeout=WAIT_SECONDS)) == [*sent, b"200"]


def test_messages_pass_one_by_one_and_not_at_the_end(client: Client, server: InferenceServer) -> None:  # noqa: ARG001
    answered = threading.Semaphore(0)

    def conversation() -> Iterator[bytes]:
        for word in (b"one", b"two"):
            yield word
            assert answered.acquire(timeout=WAIT_SECONDS)

    call = client.channel.stream_stream(ECHO)(conversation(), timeout=WAIT_SECONDS)
    for expected in (b"one", b"two"):
        assert next(call) == expected
        answered.release()
    assert list(call) == [b"2"]


def test_metadata_passes_both_ways_with_repeated_and_binary_keys(client: Client, server: InferenceServer) -> None:
    sent = (("tenant", "blue"), ("tenant", "green"), ("trace-bin", BINARY))
    server.initial = (("region", "north"), ("region", "south"), ("start-bin", BINARY))
    server.trailing = (("cost", "3"), ("cost", "4"), ("end-bin", BINARY[::-1]))
    call = client.channel.stream_stream(ECHO)(iter([b"x"]), metadata=sent, timeout=WAIT_SECONDS)
    assert list(call) == [b"x", b"1"]
    arrived = next(each for each in reversed(server.received) if each.method == ECHO).metadata
    assert [pair for pair in arrived if pair in sent] == list(sent)
    # One of each that belongs to the hop: the proxy's own, not the client's beside it.
    assert len([key for key, _ in arrived if key == "user-agent"]) == 1
    assert [pair for pair in pairs(call.initial_metadata()) if pair in server.initial] == list(server.initial)
    assert [pair for pair in pairs(call.trailing_metadata()) if pair in server.trailing] == list(server.trailing)


def test_initial_metadata_comes_before_the_first_message(client: Client, server: InferenceServer) -> None:
    server.initial = (("region", "north"),)
    heard = threading.Event()

    def silence() -> Iterator[bytes]:
        assert heard.wait(WAIT_SECONDS)
        yield b""

    call = client.channel.stream_stream(ECHO)(silence(), timeout=WAIT_SECONDS)
    assert ("region", "north") in pairs(call.initial_metadata())
    assert of_method(server, ECHO) == []
    heard.set()
    assert list(call) == [b"", b"1"]


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_an_error_passes_with_code_details_and_trailers(
    client: Client, server: InferenceServer, code: grpc.StatusCode
) -> None:
    trailing: Pairs = (("why", "because"), ("why", "also"), ("grpc-status-details-bin", b"\x08\x05" + BINARY))
    server.fault = Fault(code, "upstream says: no — really", trailing)
    for call in (
        client.channel.stream_stream(ECHO)(iter([b"x"]), timeout=WAIT_SECONDS),
        client.channel.unary_stream(ECHO)(b"x", timeout=WAIT_SECONDS),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        error: Any = caught.value
        assert (error.code(), error.details()) == (code, "upstream says: no — really")
        assert [pair for pair in pairs(error.trailing_metadata()) if pair in trailing] == list(trailing)


def test_the_remaining_deadline_is_passed_on_and_none_stays_none(client: Client, server: InferenceServer) -> None:
    for timeout in (500, None):
        assert list(client.channel.stream_stream(ECHO)(iter([b""]), timeout=timeout)) == [b"", b"1"]
    limited, unlimited = (call.remaining for call in of_method(server, ECHO))
    assert unlimited is None
    assert limited is not None
    assert 250 < limited <= 510


def test_a_deadline_that_passes_ends_the_call_at_both_ends(client: Client, server: InferenceServer) -> None:
    server.open.clear()
    with pytest.raises(grpc.RpcError) as caught:
        list(client.channel.stream_stream(ECHO)(iter([b"x"]), timeout=0.5))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(server.cancelled.is_set, "the deadline reaching the upstream server")


def test_a_cancelled_call_is_cancelled_upstream(client: Client, server: InferenceServer, sidecar: Sidecar) -> None:
    server.open.clear()
    call = client.channel.stream_stream(ECHO)(iter([b"x"]))
    eventually(lambda: bool(of_method(server, ECHO)), "the message reaching the upstream server")
    call.cancel()
    eventually(server.cancelled.is_set, "the cancellation reaching the upstream server")
    assert "Traceback" not in sidecar.stderr


def test_messages_up_to_the_limit_pass_and_larger_ones_do_not(sidecar: Sidecar, server: InferenceServer) -> None:  # noqa: ARG001
    with grpc.insecure_channel(sidecar.address, [("grpc.max_receive_message_length", -1)]) as channel:
        large = bytes(LIMIT - 1024)
        assert list(channel.stream_stream(ECHO)(iter([large]), timeout=WAIT_SECONDS)) == [large, b"1"]
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(ECHO)(iter([bytes(LIMIT + 1)]), timeout=WAIT_SECONDS))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_another_service_of_the_server_is_reached(client: Client, server: InferenceServer) -> None:
    path = "/inference.model_repository.ModelRepositoryService/RepositoryIndex"
    client.channel.unary_unary(path)(b"", timeout=WAIT_SECONDS)
    assert path in [each.method for each in server.received]


def test_a_method_that_the_server_does_not_have_is_unimplemented(client: Client, server: InferenceServer) -> None:  # noqa: ARG001
    with pytest.raises(grpc.RpcError) as caught:
        client.channel.unary_unary("/no.Such/Thing")(b"", timeout=WAIT_SECONDS)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_server_that_goes_away_in_a_stream_ends_it_with_unavailable(
    launch: Launcher, exported: Path, served_profile: Path
) -> None:
    gone = InferenceServer(lambda inputs: inputs, methods={ECHO: echo})
    gone.start()
    arguments = ("--upstream", gone.address, "--model", exported, "--profile", served_profile, "--pass-methods", ECHO)
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        gone.open.clear()
        call = client.channel.stream_stream(ECHO)(iter([b"x"]), timeout=WAIT_SECONDS)
        eventually(lambda: bool(of_method(gone, ECHO)), "the message reaching the upstream server")
        gone.stop()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        error: Any = caught.value
        assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
