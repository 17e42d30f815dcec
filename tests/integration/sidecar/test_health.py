"""What a sidecar says about itself, and how it ends."""

import asyncio
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard.protocol import SERVICE
from guard.sidecar.host.health import loop_answers
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Floats,
    Launcher,
    Sidecar,
    Upstream,
    connected,
    eventually,
    free_port,
    infer_request,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def get(sidecar: Sidecar, path: str, *, method: str = "GET", accept: str = "*/*") -> tuple[int, str]:
    connection = HTTPConnection(str(sidecar.announced["metrics"]), timeout=WAIT_SECONDS)
    with closing(connection):
        connection.request(method, path, headers={"Accept": accept})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()


def readiness(sidecar: Sidecar) -> tuple[int, dict[str, Any]]:
    status, text = get(sidecar, "/readyz")
    return status, json.loads(text)


def grpc_health(sidecar: Sidecar, service: str = SERVICE) -> int:
    with grpc.insecure_channel(sidecar.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_SECONDS).status)


def test_the_http_port_answers_what_it_has(launch: Launcher, exported: Path, served_profile: Path) -> None:
    with launch("--model", exported, "--profile", served_profile) as sidecar:
        eventually(lambda: readiness(sidecar) == (200, {"ready": True}), "readiness")
        status, text = get(sidecar, "/healthz")
        assert (status, json.loads(text)) == (200, {"alive": True})
        assert "guard_ready 1.0" in get(sidecar, "/metrics")[1]
        assert get(sidecar, "/")[0] == 404
        assert get(sidecar, "/metrics", method="POST")[0] == 405


def test_a_sidecar_starts_before_its_upstream_server_and_says_why_it_is_not_ready(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream
) -> None:
    address = f"127.0.0.1:{free_port()}"
    late = Upstream(upstream.classify).running(int(address.rpartition(":")[2]))
    with launch("--model", exported, "--profile", served_profile, "--upstream", address) as sidecar:
        reason = {"ready": False, "reason": f"the upstream server {address} is not ready"}
        eventually(lambda: readiness(sidecar) == (503, reason), "the reason")
        assert get(sidecar, "/healthz")[0] == 200
        assert grpc_health(sidecar) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert grpc_health(sidecar, "") == health_pb2.HealthCheckResponse.SERVING
        with late:
            eventually(lambda: readiness(sidecar)[0] == 200, "readiness")
            assert grpc_health(sidecar) == health_pb2.HealthCheckResponse.SERVING
            assert sidecar.metric("guard_ready") == 1
            late.ready = False
            eventually(lambda: readiness(sidecar) == (503, reason), "the end of readiness")
            assert sidecar.metric("guard_ready") == 0


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sigterm_loses_no_request_neither_running_nor_late(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, clean: Floats, loop: str
) -> None:
    patient = ("--drain-timeout", "60", "--drain-delay", "600", "--event-loop", loop)
    arguments = ("--upstream", upstream.address, "--model", exported, "--profile", served_profile, *patient)

    def ask(row: int) -> str:
        with connected(sidecar.address) as client:
            return client.infer(infer_request(clean[row : row + 1], id=f"r{row}")).response.id

    with launch(*arguments) as sidecar, ThreadPoolExecutor(16) as callers:
        assert sidecar.announced["loop"] == loop
        eventually(lambda: readiness(sidecar)[0] == 200, "readiness")
        upstream.open.clear()
        running = [callers.submit(ask, row) for row in range(8)]
        eventually(lambda: len(upstream.inferences()) == 8, "the requests reaching the upstream server")
        sidecar.process.send_signal(signal.SIGTERM)
        eventually(lambda: readiness(sidecar) == (503, {"ready": False, "reason": "guard is draining"}), "the reason")
        assert grpc_health(sidecar) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert get(sidecar, "/healthz")[0] == 200
        late = [callers.submit(ask, row) for row in range(8, 16)]
        eventually(lambda: len(upstream.inferences()) == 16, "the late requests reaching the upstream server")
        sidecar.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining for up to 60 s" in sidecar.stderr, "draining")
        assert sidecar.process.poll() is None
        upstream.open.set()
        assert [call.result(WAIT_SECONDS) for call in (*running, *late)] == [f"r{row}" for row in range(16)]
        assert sidecar.process.wait(WAIT_SECONDS) == 0


def test_a_full_sidecar_refuses_at_once_counts_it_and_still_answers_probes(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, clean: Floats
) -> None:
    arguments = ("--upstream", upstream.address, "--model", exported, "--profile", served_profile)
    request = infer_request(clean[:1])
    with (
        launch(*arguments, "--max-concurrent", "2") as sidecar,
        connected(sidecar.address) as client,
        ThreadPoolExecutor(2) as callers,
    ):
        eventually(lambda: readiness(sidecar)[0] == 200, "readiness")
        refused = {"code": "RESOURCE_EXHAUSTED"}
        assert sidecar.metric("guard_refused_total", **refused) == 0
        upstream.open.clear()
        running = [callers.submit(client.infer, request) for _ in range(2)]
        eventually(lambda: len(upstream.inferences()) == 2, "the requests reaching the upstream server")
        assert sidecar.metric("guard_active_requests") == 2
        error = client.refused(request)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details().startswith("guard: 2 requests are being answered")
        assert sidecar.metric("guard_refused_total", **refused) == 1
        assert grpc_health(sidecar) == health_pb2.HealthCheckResponse.SERVING
        upstream.open.set()
        for call in running:
            assert call.result(WAIT_SECONDS).outputs[0] == "logits"
        assert client.infer(request).outputs[0] == "logits"


def test_histograms_show_the_trace_of_a_request(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats
) -> None:
    with launch("--model", exported, "--profile", served_profile) as sidecar, connected(sidecar.address) as client:
        client.infer(infer_request(clean[:1]), metadata=(("traceparent", "not a trace, and longer than thirty-two"),))
        openmetrics = "application/openmetrics-text"
        assert "trace_id" not in get(sidecar, "/metrics", accept=openmetrics)[1]
        client.infer(infer_request(clean[:1]), metadata=(("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),))
        shown = get(sidecar, "/metrics", accept=openmetrics)[1]
        with_exemplar = {
            line.partition("_bucket{")[0] for line in shown.splitlines() if f'# {{trace_id="{TRACE}"}}' in line
        }
        assert with_exemplar == {"guard_request_duration_seconds", "guard_score"}


@pytest.mark.parametrize("blocked", [False, True])
def test_a_process_whose_loop_hangs_is_not_alive(*, blocked: bool) -> None:
    loop, go_on = asyncio.new_event_loop(), threading.Event()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        if blocked:
            loop.call_soon_threadsafe(go_on.wait)
        assert loop_answers(loop, seconds=0.2 if blocked else WAIT_SECONDS) is not blocked
    finally:
        go_on.set()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert not loop_answers(loop)
