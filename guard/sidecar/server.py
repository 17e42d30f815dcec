"""The life of a sidecar: check everything, open ports, serve, drain."""

import asyncio
import json
import logging
import os
import signal
import sys
from contextlib import suppress

import grpc
from grpc_health.v1 import health_pb2_grpc

from guard.classifiers import ExportedClassifier
from guard.errors import UsageError
from guard.profiles import Profile
from guard.sidecar import reflection
from guard.sidecar.addresses import check_free, remove_stale, socket_path, split_address
from guard.sidecar.checking import Checker
from guard.sidecar.embedded import EmbeddedService
from guard.sidecar.health import Health, ProbeServer, loop_answers
from guard.sidecar.limits import SPARE, Limited
from guard.sidecar.loops import loop_factory
from guard.sidecar.metrics import Metrics
from guard.sidecar.preflight import load
from guard.sidecar.service import InferenceService
from guard.sidecar.settings import Settings
from guard.sidecar.tls import Certificates, server_certificates
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
        UsageError: A port is taken, or certificates cannot be used.
        MissingDependencyError: uvloop was asked for and is not installed.
    """
    with asyncio.Runner(loop_factory=loop_factory(settings.loop)) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    profile, model = load(settings)
    metrics = Metrics(settings.name, settings.mode, settings.on_failure, profile)
    certificates = server_certificates(settings, metrics.tls_reload_failed)
    health, loop = Health(metrics), asyncio.get_running_loop()
    service = _service(settings, profile, model, metrics)
    try:
        server = _server(settings, service, health, metrics)
        listening = _bind(server, settings, certificates)
        with ProbeServer(settings.metrics, metrics, health, lambda: loop_answers(loop)) as probes:
            stopping = _on_signal()
            await server.start()
            _announce(settings, profile, listening, probes.address)
            watcher = asyncio.ensure_future(_watch(service, health, certificates, settings))
            stopped = asyncio.ensure_future(stopping.wait())
            await asyncio.wait({watcher, stopped}, return_when=asyncio.FIRST_COMPLETED)
            watcher.cancel()
            await _drain(server, health, settings, stopping)
            with suppress(asyncio.CancelledError):
                await watcher  # raises what it ended with, if it did not end by being cancelled
    finally:
        await service.close()


def _service(
    settings: Settings, profile: Profile, model: ExportedClassifier | None, metrics: Metrics
) -> InferenceService:
    checker = Checker(profile, model, settings, metrics)
    if settings.upstream is None and model is not None:
        return EmbeddedService(settings, checker, metrics, model)
    try:
        return UpstreamService(settings, checker, metrics)
    except UsageError:
        checker.close()
        raise


def _server(settings: Settings, service: InferenceService, health: Health, metrics: Metrics) -> grpc.aio.Server:
    server = grpc.aio.server(
        maximum_concurrent_rpcs=settings.max_concurrent + SPARE,
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            # Without this a second sidecar on the same port would start, and take half of the requests.
            ("grpc.so_reuseport", 0),
        ],
    )
    server.add_generic_rpc_handlers((Limited(service.handlers(), settings.max_concurrent, metrics),))
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    reflection.enable(server)
    return server


def _bind(server: grpc.aio.Server, settings: Settings, certificates: Certificates | None) -> str:
    """Open the inference port; the address that it has then."""
    address, path = settings.listen, socket_path(settings.listen)
    check_free(address)
    if path is not None:
        remove_stale(path)
    # A socket is nobody else's from its first moment.
    before = os.umask(0o177) if path is not None else None
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificates.credentials())
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {address}: gRPC cannot open it") from error
    finally:
        if before is not None:
            os.umask(before)
    if path is not None:
        path.chmod(int(settings.socket_mode, 8))
        return address
    host, _ = split_address(address)
    return f"{host}:{port}"


def _announce(settings: Settings, profile: Profile, listening: str, metrics: str) -> None:
    """One line of JSON on standard output: what serves where, for people and for whoever started this process."""
    calibration = profile.document.calibration
    verdict = profile.document.vetting.verdict
    line = {
        "event": "serving",
        "listen": listening,
        "tls": "none" if settings.tls_certificate is None else "mutual" if settings.tls_client_ca else "server",
        "metrics": metrics,
        "loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
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


def _on_signal() -> asyncio.Event:
    """What SIGTERM and SIGINT set."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


async def _drain(server: grpc.aio.Server, health: Health, settings: Settings, again: asyncio.Event) -> None:
    """Say first that no more should come, take what comes until that is known, then let what runs end."""
    await health.drain()
    if settings.drain_delay:
        log.info("not ready any more; requests are taken for another %g s, or a second signal", settings.drain_delay)
        again.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(again.wait(), settings.drain_delay)
    log.info("draining for up to %g s", settings.drain)
    await server.stop(settings.drain)


async def _watch(
    service: InferenceService, health: Health, certificates: Certificates | None, settings: Settings
) -> None:
    """Keep readiness true, certificates fresh and state on disk."""
    loop = asyncio.get_running_loop()
    kept, known = loop.time(), False
    while True:
        if loop.time() - kept >= SAVE_SECONDS:
            await asyncio.to_thread(service.checker.watch.save)
            kept = loop.time()
        if certificates is not None:
            await asyncio.to_thread(certificates.refresh)
        ready = await service.ready()
        reason = None if ready else f"the upstream server {settings.upstream} is not ready"
        if reason != health.reason:
            await health.tell(reason)
            if reason is not None:
                log.warning("%s; requests get UNAVAILABLE", reason)
            elif known:
                log.info("the upstream server %s is ready", settings.upstream)
            known = True
        await asyncio.sleep(READINESS_SECONDS)
