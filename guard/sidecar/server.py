"""The life of a sidecar: check everything, open ports, serve, drain."""

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from guard import profiles
from guard.classifiers import ExportedClassifier
from guard.errors import ProfileError, UsageError
from guard.profiles import Profile
from guard.sidecar import reflection
from guard.sidecar.checking import Checker
from guard.sidecar.embedded import EmbeddedService
from guard.sidecar.metrics import Metrics
from guard.sidecar.service import SERVICE, InferenceService
from guard.sidecar.settings import Settings, split_address
from guard.sidecar.upstream import UpstreamService

READINESS_SECONDS = 1.0
SAVE_SECONDS = 60.0
"""How often the state of monitor and sample is kept, besides at the end."""
log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Run a sidecar until SIGTERM or SIGINT.

    Raises:
        ProfileError: The profile is missing, damaged, not calibrated, or of another model.
        ModelError: The exported model is missing or damaged.
        UsageError: A port is taken.
    """
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    profile = profiles.read(settings.profile)
    model = ExportedClassifier(settings.model) if settings.model else None
    if model is not None and model.digest != profile.document.model.digest:
        raise ProfileError(
            f"the profile {settings.profile} is of another model than {settings.model}: vet and calibrate the model "
            "that was exported, or export the one that was vetted"
        )
    metrics = Metrics(settings.name, settings.mode, settings.on_failure, profile)
    checker = Checker(profile, model, settings, metrics)
    service: InferenceService
    if settings.upstream is None and model is not None:
        service = EmbeddedService(settings, checker, metrics, model)
    else:
        service = UpstreamService(settings, checker, metrics)
    server = grpc.aio.server(
        maximum_concurrent_rpcs=settings.max_concurrent,
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            # Without this a second sidecar on the same port would start, and take half of the requests.
            ("grpc.so_reuseport", 0),
        ],
    )
    server.add_generic_rpc_handlers((service.handlers(),))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable(server)
    metrics_address, stop_metrics = _start_metrics(settings, metrics)
    try:
        port = _bind(server, settings.listen)
        await server.start()
        _announce(settings, profile, port, metrics_address)
        await _run(server, service, checks, metrics, settings)
    finally:
        await service.close()
        stop_metrics()


def _bind(server: grpc.aio.Server, address: str) -> int:
    refused = UsageError(f"cannot listen on {address}: the port is taken or the address is not of this machine")
    if not _can_bind(*split_address(address)):
        raise refused
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise refused from error


def _can_bind(host: str, port: int) -> bool:
    """Tried before gRPC does, which would write lines of its own to standard error."""
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                return True
    return False


def _start_metrics(settings: Settings, metrics: Metrics) -> tuple[str, Callable[[], None]]:
    host, port = split_address(settings.metrics)
    try:
        http, thread = start_http_server(port, host, registry=metrics.registry)
    except OSError as error:
        raise UsageError(f"cannot serve metrics on {settings.metrics}: {error.strerror}") from error

    def stop() -> None:
        http.shutdown()
        http.server_close()
        thread.join()

    return f"{host}:{http.server_port}", stop


def _announce(settings: Settings, profile: Profile, port: int, metrics: str) -> None:
    """One line of JSON on standard output: what serves where, for people and for whoever started this process."""
    host, _ = split_address(settings.listen)
    calibration = profile.document.calibration
    verdict = profile.document.vetting.verdict
    line = {
        "event": "serving",
        "listen": f"{host}:{port}",
        "metrics": metrics,
        "model": settings.name,
        "digest": profile.document.model.digest,
        "verdict": verdict.outcome,
        "mode": settings.mode,
        "failure_policy": settings.on_failure,
        "alpha": calibration.threshold.alpha if calibration else None,
        "upstream": settings.upstream,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    if verdict.outcome == "backdoored":
        log.warning(
            "this model is vetted as backdoored (class %r); it is served because screening was asked for, repair it",
            profile.class_name(verdict.target or 0),
        )


async def _run(
    server: grpc.aio.Server,
    service: InferenceService,
    checks: health.aio.HealthServicer,
    metrics: Metrics,
    settings: Settings,
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    watcher = asyncio.ensure_future(_watch(service, checks, metrics, settings))
    await stopping.wait()
    log.info("draining for up to %g s", settings.drain)
    watcher.cancel()
    with suppress(asyncio.CancelledError):
        await watcher
    metrics.ready.set(0)
    await checks.enter_graceful_shutdown()
    await server.stop(settings.drain)


async def _watch(
    service: InferenceService, checks: health.aio.HealthServicer, metrics: Metrics, settings: Settings
) -> None:
    """Keep grpc.health.v1 true: "" says that the process lives, the service's name that it can answer."""
    states, loop = health_pb2.HealthCheckResponse, asyncio.get_running_loop()
    await checks.set("", states.SERVING)
    known: bool | None = None
    kept = loop.time()
    while True:
        if loop.time() - kept >= SAVE_SECONDS:
            await asyncio.to_thread(service.checker.watch.save)
            kept = loop.time()
        ready = await service.ready()
        if ready is not known:
            await checks.set(SERVICE, states.SERVING if ready else states.NOT_SERVING)
            metrics.ready.set(int(ready))
            if not ready:
                log.warning("the upstream server %s is not ready; requests get UNAVAILABLE", settings.upstream)
            elif known is not None:
                log.info("the upstream server %s is ready", settings.upstream)
            known = ready
        await asyncio.sleep(READINESS_SECONDS)
