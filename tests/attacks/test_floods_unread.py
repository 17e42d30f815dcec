"""Clients that ask and do not take the answer: nobody else notices."""

import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard.sidecar.host.limits import _UNTAKEN_OF_ALL, _UNTAKEN_OF_ONE, _UNTAKEN_OF_ONE_IF_MANY, _Untaken
from tests.integration.sidecar.conftest import Floats, Launcher, connected, infer_request

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, DATA = 4, 1, 0


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: str, value: str) -> bytes:
    """A header as HPACK writes it without tables and compression."""
    return b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in (name, value))


def unread_calls(address: str, path: str, count: int, stack: ExitStack) -> None:
    """Send calls over a new connection on which not one byte of a reply may be sent, and leave it open."""
    host, _, port = address.rpartition(":")
    connection = stack.enter_context(socket.create_connection((host, int(port))))
    head = b"".join(
        header(name, value)
        for name, value in (
            *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")),
            *(("content-type", "application/grpc"), ("te", "trailers")),
        )
    )
    calls = b"".join(
        frame(HEADERS, 4, stream, head) + frame(DATA, 1, stream, bytes(5)) for stream in range(1, 2 * count, 2)
    )
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)) + calls)


@pytest.mark.parametrize("connections", [1, 12])
@pytest.mark.parametrize("method", ["ServerLive", "ModelMetadata"])
def test_replies_that_nobody_takes_keep_nobody_out(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats, connections: int, method: str
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--max-concurrent", "16", "--drain-timeout", "1")
    with launch(*arguments) as sidecar, ExitStack() as stack, connected(sidecar.address) as client:
        for _ in range(connections):
            unread_calls(sidecar.address, f"/inference.GRPCInferenceService/{method}", 200, stack)
        for row in range(20):
            assert client.infer(infer_request(clean[row : row + 1])).response.outputs
        check = health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        with urlopen(f"http://{sidecar.announced['metrics']}/readyz", timeout=60) as reply:
            assert reply.status == 200


class Call:
    """A call of a connection, with a reply of some bytes."""

    def __init__(self, peer: str, reply: int = 0) -> None:
        self.peer, self.reply = peer, reply


def test_a_connection_that_takes_nothing_gets_nothing_more() -> None:
    untaken = _Untaken(8000)
    calls = [Call("a") for _ in range(_UNTAKEN_OF_ONE)]
    for call in calls:
        assert untaken.allow("a")
        untaken.add(call)  # type: ignore[arg-type]
    assert not untaken.allow("a")
    assert untaken.allow("b")
    untaken.remove(calls[0])  # type: ignore[arg-type]
    assert untaken.allow("a")


def test_large_replies_count_by_their_bytes() -> None:
    untaken = _Untaken(8000)
    untaken.add(Call("a", 1001))  # type: ignore[arg-type]
    assert not untaken.allow("a")
    assert untaken.allow("b")


def test_if_many_take_nothing_each_gets_little_and_the_others_all() -> None:
    untaken = _Untaken(8000)
    for number in range(_UNTAKEN_OF_ALL):
        untaken.add(Call(str(number % 100)))  # type: ignore[arg-type]
    assert not untaken.allow("0")
    for _ in range(_UNTAKEN_OF_ONE_IF_MANY - 1):
        untaken.add(Call("new"))  # type: ignore[arg-type]
    assert untaken.allow("new")
    untaken.add(Call("new"))  # type: ignore[arg-type]
    assert not untaken.allow("new")


def test_the_limit_of_grpc_itself_is_none(launch: Launcher, exported: Path, served_profile: Path) -> None:
    """It would count the calls above, whoever they are of."""
    with launch("--model", exported, "--profile", served_profile, "--max-concurrent", "1") as sidecar, ExitStack() as s:
        for _ in range(40):
            unread_calls(sidecar.address, "/inference.GRPCInferenceService/ServerLive", 64, s)
        with grpc.insecure_channel(sidecar.address) as channel:
            assert channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=60)
