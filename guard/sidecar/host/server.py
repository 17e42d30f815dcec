"""Start, service and drain of a sidecar."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2_grpc

from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.models import Models, Served
from guard.sidecar.decisions.state import Role, hold
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.host import reflection
from guard.sidecar.host.admin import AdminServer
from guard.sidecar.host.health import Health, ProbeServer, loop_answers
from guard.sidecar.host.limits import Bounds, Limited, most_memory, resident_bytes
from guard.sidecar.host.processes import Worker, supervise
from guard.sidecar.host.reporting import Reporter
from guard.sidecar.inference.embedded import EmbeddedService
from guard.sidecar.inference.screener import Screener
from guard.sidecar.inference.service import InferenceService
from guard.sidecar.inference.upstream import UpstreamService
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry import logs
from guard.sidecar.telemetry.metrics import Metrics
from guard.sidecar.transport.loops import loop_factory
from guard.sidecar.transport.ports import open_port
from guard.sidecar.transport.tls import Certificates, server_certificates

_PENDING_CALLS = 20_000
"""Calls that may have arrived before anybody looks at them."""
_BEYOND_DRAIN_SECONDS = 0.5
"""Seconds that gRPC is given after the time for running calls."""
WATCH_SECONDS = 1.0
"""Seconds between two checks of the upstream server and of the files on disk."""
SAVE_SECONDS = 60.0
"""Seconds between saves of the monitors' states and of the samples, which are also saved at the end."""
log = logging.getLogger(__name__)


class Host(Protocol):
    """What the process of a sidecar is: the only one (`Alone`), or one of several on a port (`Worker`)."""

    @property
    def index(self) -> int | None:
        """The number of the process, from 0; None if it is the only one."""

    @property
    def listen(self) -> str:
        """HOST:PORT or unix:PATH for inference."""

    @property
    def shares_port(self) -> bool:
        """Whether other processes listen at `listen` too."""

    @property
    def probes(self) -> str:
        """HOST:PORT or unix:PATH for `/metrics`, `/healthz` and `/readyz`."""

    def announce(self, line: Mapping[str, Any]) -> None:
        """Report that requests are served."""

    def stopping(self, on_reload: Callable[[], object]) -> asyncio.Event:
        """An event that is set each time that the sidecar is asked to stop.

        Args:
            on_reload: Called on the running loop each time that the sidecar is asked to read its files again.
        """


class Alone:
    """The only process of a sidecar.

    Args:
        settings: Settings of the sidecar.
    """

    index = None
    shares_port = False

    def __init__(self, settings: Settings) -> None:
        self.listen, self.probes = settings.listen, settings.metrics

    def announce(self, line: Mapping[str, Any]) -> None:
        """Write a line of JSON to standard output."""
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def stopping(self, on_reload: Callable[[], object]) -> asyncio.Event:
        """An event of the running loop that is set at each SIGTERM or SIGINT; SIGHUP asks to read files again."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, event.set)
        loop.add_signal_handler(signal.SIGHUP, on_reload)
        return event


def serve(settings: Settings) -> None:
    """Run a sidecar until SIGTERM or SIGINT; at SIGHUP it reads its files again.

    Raises:
        ProfileError: A profile is missing, damaged, not calibrated, or of another model.
        ModelError: An exported model is missing or damaged.
        EvidenceError: The evidence log can neither be opened nor begun anew.
        UsageError: A port is taken, another sidecar uses the folder for state, or a certificate cannot be used.
        MissingDependencyError: uvloop was asked for and is not installed.
    """
    if settings.processes > 1:
        with hold(settings.state_dir, "parent"):
            supervise(
                partial(_work, settings=settings),
                count=settings.processes,
                listen=settings.listen,
                metrics=settings.metrics,
            )
        return
    with asyncio.Runner(loop_factory=loop_factory(settings.event_loop)) as runner:
        runner.run(_serve(settings, Alone(settings)))


def _work(worker: Worker, *, settings: Settings) -> None:
    """Run one of several processes."""
    logs.configure(settings.log_format, worker.index)
    with asyncio.Runner(loop_factory=loop_factory(settings.event_loop)) as runner:
        runner.run(_serve(settings, worker))


async def _serve(settings: Settings, host: Host) -> None:
    metrics = Metrics()
    metrics.most_active.set(settings.max_concurrent)
    async with AsyncExitStack() as stack:
        role: Role = "alone" if host.index is None else "worker"
        stack.enter_context(hold(settings.state_dir, role, metrics.state_damaged))
        shared = Shared(
            settings, Workers(settings.workers, settings.max_queued), Recorder(settings, metrics), host.index
        )
        stack.callback(shared.close)
        models = Models(shared, metrics)
        stack.callback(models.save)
        # The work in progress ends before the state is saved.
        stack.callback(shared.workers.close)
        screener = Screener(settings, models, metrics)
        service = (EmbeddedService if settings.upstream is None else UpstreamService)(screener)
        stack.push_async_callback(service.close)
        certificates = server_certificates(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca, metrics.tls_reload_failed
        )
        health, loop = Health(metrics), asyncio.get_running_loop()
        probes = stack.enter_context(ProbeServer(host.probes, metrics, health, lambda: loop_answers(loop)))
        resting = resident_bytes()
        limited = Limited(service.handlers(), Bounds.of(settings), metrics)
        probed = Limited(_OwnHandlers(health), Bounds.of_probes(settings), metrics)
        server = _server(settings, limited, probed, shared_port=host.shares_port)
        reporter = Reporter(shared, models, health, metrics)
        admin = dashboard = None
        if settings.admin is not None:
            opened = AdminServer(reporter, settings, host.index, health)
            admin = (await stack.enter_async_context(opened)).address
        if settings.dashboard is not None:
            # Loaded only here: most sidecars serve no page, and a start should not wait for it.
            from guard.sidecar.host.dashboard import Access, Own, serve_dashboard

            dashboard = stack.enter_context(serve_dashboard(settings.dashboard, [Own(reporter)], Access.of(settings)))
        listening = open_port(
            server, host.listen, certificates, socket_mode=settings.socket_mode, shared=host.shares_port
        )
        asked = asyncio.Event()
        stopping = host.stopping(asked.set)
        # Before the first request, so that a health check never learns that the service is unknown.
        await health.tell("guard is starting")
        await server.start()
        most = most_memory(settings, resting)
        addresses = {"listen": listening, "metrics": probes.address, "admin": admin, "dashboard": dashboard}
        host.announce({**_summary(settings, models, addresses), "most_memory_bytes": most})
        if not host.index:
            _warn_of_backdoors(models)
        watchers = [
            asyncio.ensure_future(watcher)
            for watcher in (
                _keep_ready(service, limited, models, metrics, settings.upstream, health),
                _keep_fresh(models, certificates, asked, settings.certificate_interval),
                limited.watch(),
                probed.watch(),
            )
        ]
        stopped = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({*watchers, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for watcher in watchers:
            watcher.cancel()
        ended = await _drain(server, limited, health, settings, stopping)
        for watcher in watchers:
            with suppress(asyncio.CancelledError):
                await watcher  # raises what it ended with, if it did not end by being cancelled
    if shared.workers.stuck or not ended:
        _end_at_once()


def _end_at_once() -> None:
    """End the process in spite of threads that hang in a library: all that had to be saved is saved."""
    log.warning("a library did not end in time; the state is saved, and the process ends without it")
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _server(settings: Settings, limited: Limited, probed: Limited, *, shared_port: bool) -> grpc.aio.Server:
    server = grpc.aio.server(
        # Calls are limited in `Limited`, which knows whose they are. A limit of gRPC's own would count calls whose
        # clients do not take the reply, so that they keep out all others.
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            # Without this, a second sidecar on the same port would start and take half of the requests.
            ("grpc.so_reuseport", int(shared_port)),
            # Beyond these numbers of calls that have arrived and that nobody has looked at, by default 1,000 and 3,000,
            # gRPC cancels calls at random: in a burst, those of other clients too.
            ("grpc.server.max_pending_requests", _PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING_CALLS),
            # What one client can have open; the limits of the whole sidecar are counted in `Limited`.
            ("grpc.max_concurrent_streams", limited.bounds.outer),
            *_keepalive(settings),
        ],
    )
    server.add_generic_rpc_handlers((limited, probed))
    return server


def _keepalive(settings: Settings) -> list[tuple[str, int]]:
    """What gRPC tolerates of its clients, and how it finds out that one has vanished."""
    options = [
        ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * settings.ping_interval)),
        ("grpc.keepalive_permit_without_calls", int(settings.ping_without_calls)),
        # A call of a client whose machine has vanished must not occupy a place for ever.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_connection_idle_ms", round(1000 * settings.max_connection_idle)),
    ]
    if settings.max_connection_age is not None:
        options += [
            ("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age)),
            ("grpc.max_connection_age_grace_ms", round(1000 * settings.max_connection_age_grace)),
        ]
    return options


class _OwnHandlers(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc publishes no types
    """Health checks and reflection: collected as a server would, so that they can be limited."""

    def __init__(self, health: Health) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, self)
        reflection.enable(self)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Collect handlers."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """Do nothing: these are among the generic handlers too."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a method; None if it is none of these."""
        found = (handlers.service(handler_call_details) for handlers in self._handlers)
        return next((handler for handler in found if handler is not None), None)


def _summary(settings: Settings, models: Models, addresses: Mapping[str, str | None]) -> dict[str, Any]:
    """What is served where, for people and for the program that started the sidecar."""
    return {
        "event": "serving",
        **addresses,
        "tls": "none" if settings.tls_certificate is None else "mutual" if settings.tls_client_ca else "server",
        "loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
        "upstream": settings.upstream,
        "models": [_description(served) for served in models.served],
    }


def _warn_of_backdoors(models: Models) -> None:
    for served in models.served:
        verdict = served.checker.profile.document.vetting.verdict
        if verdict.outcome == "backdoored":
            log.warning(
                "the vetting of the model %s ended with the verdict backdoored (target class %r); screening protects "
                "only until the model is replaced",
                served.settings.label,
                served.checker.profile.class_name(verdict.target or 0),
            )


def _description(served: Served) -> dict[str, Any]:
    settings, document = served.settings, served.checker.profile.document
    return {
        "name": settings.model_name,
        "version": served.version,
        "digest": document.model.digest,
        "verdict": document.vetting.verdict.outcome,
        "mode": settings.mode,
        "failure_policy": settings.on_failure,
        "alpha": served.checker.alpha,
        "second_opinion": "off" if served.checker.opinions is None else served.checker.opinions.rule,
    }


async def _drain(
    server: grpc.aio.Server, limited: Limited, health: Health, settings: Settings, again: asyncio.Event
) -> bool:
    """Report that no more requests should come, serve those that still come, then wait for the running ones to end.

    Returns:
        Whether gRPC has ended too.
    """
    await health.drain()
    if settings.drain_delay:
        log.info(
            "not ready any more; requests are served for another %g s, or until a second signal", settings.drain_delay
        )
        again.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(settings.drain_delay):
                await again.wait()
    log.info("draining for up to %g s", settings.drain_timeout)
    end = perf_counter() + settings.drain_timeout
    # When gRPC stops, it answers CANCELLED to calls that it has received and not handed over yet (grpc/grpc#41785), and
    # no client retries after that. So all new calls are accepted first, and held: clients wait, and soon no more calls
    # arrive. Once their connections have been told to end, the held calls get UNAVAILABLE and are retried elsewhere.
    await limited.hold()
    stopping = asyncio.ensure_future(server.stop(max(0.0, end - perf_counter())))
    await asyncio.sleep(0)
    limited.release()
    # gRPC ends calls after its time, but may first work through what a client has sent; see `_end_at_once`.
    done, _ = await asyncio.wait({stopping}, timeout=max(0.0, end - perf_counter()) + _BEYOND_DRAIN_SECONDS)
    return bool(done)


async def _keep_ready(
    service: InferenceService,
    limited: Limited,
    models: Models,
    metrics: Metrics,
    upstream: str | None,
    health: Health,
) -> None:
    """Keep the reported health up to date."""
    known = False
    while True:
        reason, answers = limited.trouble or models.trouble, await service.ready()
        if upstream is not None:
            metrics.upstream_up.labels(upstream).set(int(answers))
        if not answers:
            reason = f"the upstream server {upstream} is not ready"
        if reason != health.reason:
            await health.tell(reason)
            if reason is not None:
                log.warning("%s; requests are refused", reason)
            elif known:
                log.info("requests are served again")
            known = True
        await asyncio.sleep(WATCH_SECONDS)


async def _keep_fresh(models: Models, certificates: Certificates | None, asked: asyncio.Event, interval: float) -> None:
    """Load files that change on disk, all of them when that is asked for; check certificates and save the state."""
    last_save = last_check = perf_counter()
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(WATCH_SECONDS):  # `wait_for` would sometimes lose a cancellation
                await asked.wait()
        again = asked.is_set()
        asked.clear()
        if again:
            log.info("SIGHUP: certificates, profiles and models are read again")
        if certificates is not None:
            await asyncio.to_thread(certificates.refresh, again=again)
        await models.refresh(again=again)
        if again or perf_counter() - last_check >= interval:
            await asyncio.to_thread(models.recertify)
            last_check = perf_counter()
        if perf_counter() - last_save >= SAVE_SECONDS:
            await asyncio.to_thread(models.save)
            last_save = perf_counter()
