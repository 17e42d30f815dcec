"""Calls that cost nothing to make and keep others out: silent ones, too many, too large, too many pings."""

import asyncio
import gc
import io
import json
import signal
import subprocess
import sys
import threading
import urllib.request
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.error import HTTPError

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar import Settings
from guard.sidecar.host.limits import Bounds, Limited, most_memory
from guard.sidecar.telemetry.metrics import Metrics
from tests.damage import FILES
from tests.integration.sidecar.conftest import Launcher, Sidecar, connected, eventually, infer_request
from tests.integration.sidecar.conftest import classify as classify  # noqa: PLC0414
from tests.integration.sidecar.conftest import clean as clean  # noqa: PLC0414 - fixtures
from tests.integration.sidecar.conftest import launch as launch  # noqa: PLC0414
from tests.integration.sidecar.conftest import served_profile as served_profile  # noqa: PLC0414

WAIT = 30
EMPTY_INPUT = b"\x2a\0"
BOUNDS = Bounds(calls=2, streams=2, message_bytes=10_000, inflight_bytes=10_000, first_message=60, idle=60)
Floats = np.ndarray


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers with what it got; `open` lets it answer."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.received: list[bytes] = []
        self.refuse, self.held = False, list[weakref.ref[set[int]]]()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if handler_call_details.method == "/stream":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _refuse(self, context: grpc.aio.ServicerContext) -> None:
        message = set[int]()
        self.held.append(weakref.ref(message))
        try:
            raise ValueError(message)  # noqa: TRY301
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")

    async def _unary(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        if self.refuse:
            await self._refuse(context)
        self.received.append(data)
        await self.open.wait()
        return data

    async def _stream(self, _: object, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            if self.refuse:
                await self._refuse(context)
            self.received.append(message)
            await self.open.wait()
            await context.write(message)
            context.forget(len(message))


class Served:
    def __init__(self, limited: Limited, echo: Echo, channel: grpc.aio.Channel) -> None:
        self.limited, self.echo = limited, echo
        self.unary, self.stream = channel.unary_unary("/unary"), channel.stream_stream("/stream")
        self._silent = channel.stream_unary("/unary")

    def silent(self) -> grpc.aio.StreamUnaryCall:
        """A unary call that sends nothing."""
        return self._silent()


@asynccontextmanager
async def serving(bounds: Bounds = BOUNDS) -> AsyncIterator[Served]:
    echo = Echo()
    limited = Limited(echo, bounds, Metrics())
    server = grpc.aio.server(maximum_concurrent_rpcs=bounds.outer, options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((limited,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    watching = asyncio.ensure_future(limited.watch())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(limited, echo, channel)
    watching.cancel()
    await server.stop(None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def refusal(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, WAIT)  # type: ignore[arg-type]
    return caught.value.code(), caught.value.details() or ""


async def test_calls_that_send_nothing_keep_nobody_out() -> None:
    async with serving() as served:
        silent = [served.silent() for _ in range(320)]
        for number in range(20):
            assert await served.unary(b"%d" % number, timeout=WAIT) == b"%d" % number
        # Those that have waited longest make room; the others may still send something.
        await until(lambda: sum(call.done() for call in silent) == 257)
        ended = next(call for call in silent if call.done())
        assert (await refusal(ended))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        late = next(call for call in silent if not call.done())
        await late.write(b"late")
        assert await late == b"late"


async def test_silent_calls_end_after_a_while() -> None:
    async with serving(Bounds(2, 2, 100, 100, first_message=0.2, idle=60)) as served:
        code, details = await refusal(served.silent())
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert details == "guard: no message came within 0.2 s"
        call = served.stream()
        assert (await refusal(call.read()))[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_idle_streams_end_and_those_that_talk_do_not() -> None:
    async with serving(Bounds(4, 4, 100, 100, first_message=60, idle=0.6)) as served:
        idle, talking = served.stream(), served.stream()
        await idle.write(b"a")
        assert await idle.read() == b"a"
        reading = asyncio.ensure_future(idle.read())
        while not reading.done():
            await talking.write(b"b")
            assert await talking.read() == b"b"
            await asyncio.sleep(0.02)
        assert (await refusal(reading))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        await talking.write(b"c")
        assert await talking.read() == b"c"


async def test_calls_are_limited_when_their_message_is_there() -> None:
    async with serving() as served:
        served.echo.open.clear()
        running = [asyncio.ensure_future(served.unary(b"a", timeout=WAIT)) for _ in range(2)]
        await until(lambda: len(served.echo.received) == 2)
        assert served.limited.trouble == "2 requests are being answered, and no more are taken"
        code, details = await refusal(served.unary(b"b"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 requests are being answered" in details
        served.echo.open.set()
        assert await asyncio.gather(*running) == [b"a", b"a"]
        assert await served.unary(b"c", timeout=WAIT) == b"c"
        assert served.limited.trouble is None


async def test_streams_are_limited_and_silent_ones_make_room() -> None:
    async with serving(Bounds(9, 2, 100, 1000, first_message=60, idle=60)) as served:
        silent = served.stream()
        await until(lambda: bool(served.limited._waiting))
        talking = [served.stream() for _ in range(2)]
        for call in talking:
            await call.write(b"a")
            assert await call.read() == b"a"
        assert (await refusal(silent.read()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        code, details = await refusal(served.stream().read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 streams are open" in details
        assert await served.unary(b"b", timeout=WAIT) == b"b"
        await talking[0].done_writing()
        assert await talking[0].read() is grpc.aio.EOF
        third = served.stream()
        await third.write(b"c")
        assert await third.read() == b"c"


async def test_bytes_are_limited_over_all_calls_and_come_back() -> None:
    async with serving() as served:
        served.echo.open.clear()
        running = asyncio.ensure_future(served.unary(bytes(6000), timeout=WAIT))
        await until(lambda: len(served.echo.received) == 1)
        code, details = await refusal(served.unary(bytes(6000)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "take up all memory" in details
        stream = served.stream()
        await stream.write(bytes(6000))
        assert (await refusal(stream.read()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        served.echo.open.set()
        # The reply counts beside the request.
        assert (await refusal(running))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        for _ in range(5):
            assert len(await served.unary(bytes(5000), timeout=WAIT)) == 5000
        long = served.stream()
        for _ in range(5):
            await long.write(bytes(5000))
            assert len(await long.read()) == 5000


async def test_what_a_stream_gives_back_after_its_end_is_not_counted_twice() -> None:
    async with serving() as served:
        stream = served.stream()
        await stream.write(bytes(4000))
        assert len(await stream.read()) == 4000
        (call,) = served.limited._open_streams  # as a check that outlasts its stream has it
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        await until(lambda: not served.limited._open_streams)
        call.forget(4000)
        assert served.limited._bytes == 0


async def test_a_call_without_a_message_is_refused() -> None:
    async with serving() as served:
        call = served.silent()
        await call.done_writing()
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "guard: the call has no message")


async def test_a_message_that_is_too_long_is_refused_where_grpc_would_take_it() -> None:
    async with serving() as served:
        code, details = await refusal(served.unary(bytes(10_001)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details == "guard: the message is longer than 10000 bytes"


async def test_what_arrives_is_refused_when_memory_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    used = 0
    monkeypatch.setattr("guard.sidecar.host.limits.resident_bytes", lambda: used)
    async with serving(Bounds(9, 9, 100, 1000, first_message=60, idle=60, memory=10)) as served:
        arriving = served.silent()
        assert await served.unary(b"a", timeout=WAIT) == b"a"
        used = 11
        assert (await refusal(arriving))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert served.limited.trouble == "the memory for requests is used up"
        assert (await refusal(served.unary(b"b")))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        used = 9
        await until(lambda: served.limited.trouble is None)
        assert await served.unary(b"c", timeout=WAIT) == b"c"


async def test_a_refused_message_is_freed_at_once() -> None:
    async with serving() as served:
        served.echo.refuse = True
        gc.collect()
        gc.disable()
        try:
            for call in (served.unary(b"a"), served.stream([b"a"])):
                code, _ = await refusal(call if isinstance(call, grpc.aio.UnaryUnaryCall) else call.read())
                assert code is grpc.StatusCode.INVALID_ARGUMENT
            await until(lambda: all(held() is None for held in served.echo.held))
            assert len(served.echo.held) == 2
        finally:
            gc.enable()


def test_the_most_memory_follows_from_the_settings() -> None:
    def most(**more: object) -> int:
        return most_memory(Settings.load(None, profile=Path("p"), model=Path("m"), **more), 0)

    assert most(max_message_bytes=2**20) - most(max_message_bytes=2**19) == 16 * 2**19
    assert most(max_pixels=2 * 10**7) - most(max_pixels=10**7) == 20 * 10**7
    assert most(workers=3) - most(workers=2) == 20 * 50_000_000
    assert most(max_inflight_bytes=2**30) - most(max_inflight_bytes=2**29) == 3 * 2**29


@pytest.fixture(scope="module")
def sidecar(launch: Launcher, exported: Path, served_profile: Path) -> Iterator[Sidecar]:
    few = ("--max-concurrent", "4", "--ping-interval", "0.05", "--max-message-bytes", str(2**20))
    with launch("--model", exported, "--profile", served_profile, *few) as running:
        yield running


def readyz(sidecar: Sidecar) -> int:
    try:
        with urllib.request.urlopen(f"http://{sidecar.announced['metrics']}/readyz", timeout=WAIT) as reply:
            return int(reply.status)
    except HTTPError as error:
        return error.code


def test_a_sidecar_answers_under_silent_calls(sidecar: Sidecar, clean: Floats) -> None:
    request = infer_request(clean[:1])
    with grpc.insecure_channel(sidecar.address, [("grpc.use_local_subchannel_pool", 1)]) as flooding:
        silent, watching = (
            flooding.stream_stream(f"/{SERVICE}/ModelInfer"),
            flooding.stream_stream("/grpc.health.v1.Health/Watch"),
        )
        calls = [method(_nothing()) for _ in range(160) for method in (silent, watching)]
        with connected(sidecar.address) as client:
            assert client.infer(request).decision in {"pass", "flag"}
            asked = health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT)
            assert asked.status == health_pb2.HealthCheckResponse.SERVING
        assert readyz(sidecar) == 200
        for call in calls:
            call.cancel()


def _nothing() -> Iterator[bytes]:
    """Never sends anything, and ends with its call."""
    threading.Event().wait(WAIT)
    yield b""


def test_pings_of_clients_are_tolerated(sidecar: Sidecar) -> None:
    often = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_time_between_pings_ms", 100),
    ]
    with grpc.insecure_channel(sidecar.address, often) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        # Far longer than the three pings after which gRPC's own limit would end the connection.
        ended = threading.Event()
        watch.add_callback(ended.set)
        assert not ended.wait(2.0)
        watch.cancel()


def high_water(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_memory_stays_under_the_bound_that_the_sidecar_states(
    launch: Launcher, exported: Path, served_profile: Path
) -> None:
    mib = 2**20
    limits = ("--max-message-bytes", 4 * mib, "--max-inflight-bytes", 8 * mib, "--max-pixels", 1_000_000)
    large = ModelInferRequest(model_name="classifier", raw_input_contents=[bytes(4 * mib - 100)])
    large.inputs.add(name="image", datatype="FP32", shape=[1, 3, 16, 16])
    picture = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(picture, "WEBP", lossless=True)
    pictures = ModelInferRequest(model_name="classifier")
    pictures.inputs.add(name="image", datatype="BYTES", shape=[2]).contents.bytes_contents.extend(
        [picture.getvalue()] * 2
    )
    floods = [large.SerializeToString(), pictures.SerializeToString(), EMPTY_INPUT * mib]
    with launch("--model", exported, "--profile", served_profile, *map(str, limits)) as running:
        most = int(running.announced["most_memory_bytes"])
        with grpc.insecure_channel(running.address) as channel:
            method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            for _ in range(2):
                calls = [method.future(data, timeout=WAIT) for data in floods for _ in range(10)]
                codes = {call.code() for call in calls}
                assert codes <= {
                    grpc.StatusCode.OK,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    grpc.StatusCode.UNAVAILABLE,
                }
        assert high_water(running.process.pid) < most
        # It is a bound and not a number beyond all use: pixels, messages in flight, and those that arrive.
        assert most < high_water(running.process.pid) + (20 * 17_000_000 + 3 * 8 * mib + 16 * 4 * mib)


STUCK = """
import sys, threading
from pathlib import Path
import guard.sidecar.decisions.images as reading
from guard.sidecar import Settings, serve

def hang(file, **_):
    print("hanging", file=sys.stderr, flush=True)
    threading.Lock().acquire() and threading.Event().wait()

if __name__ == "__main__":
    reading.decode = hang
    serve(Settings.load(None, profile=Path(sys.argv[1]), model=Path(sys.argv[2]), state_dir=Path(sys.argv[3]),
                        listen="127.0.0.1:0", metrics="127.0.0.1:0", drain_timeout=0.1, processes=int(sys.argv[4])))
else:
    reading.decode = hang
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_thread_that_hangs_does_not_outlast_a_drain(
    served_profile: Path, exported: Path, tmp_path: Path, processes: int
) -> None:
    script, state, errors = tmp_path / "stuck.py", tmp_path / "state", tmp_path / "errors"
    state.mkdir()
    script.write_text(STUCK)
    command = [sys.executable, str(script), str(served_profile), str(exported), str(state), str(processes)]
    with errors.open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["listen"]
            request = ModelInferRequest(model_name="classifier")
            request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(FILES[0])
            with grpc.insecure_channel(address) as channel:
                call = channel.unary_unary(f"/{SERVICE}/ModelInfer").future(request.SerializeToString())
                eventually(lambda: b"hanging" in errors.read_bytes(), "the work")
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT) == 0, errors.read_text()
                call.cancel()
        finally:
            process.kill()
    assert list(state.glob("monitor-*"))
    assert b"Traceback" not in errors.read_bytes()
