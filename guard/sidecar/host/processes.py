"""Several processes on one port: a parent that loads no models, and workers that share the port's connections.

A Python interpreter runs one thread of Python at a time; several processes use several cores. The kernel (SO_REUSEPORT)
assigns each new *connection* to one of them, by a hash of its addresses, and all requests of that connection stay
there. So a client with one channel keeps one process busy, and a few channels may well end up at the same process: the
load is even if there are many connections, or if they come from a load balancer that opens several. When a process
ends, connections that it has not accepted yet are reset; a client that retries reaches another process.
"""

import asyncio
import json
import logging
import multiprocessing
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from multiprocessing.context import SpawnProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from guard.errors import GuardError, UsageError
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.host.health import LOOP_SECONDS, ProbeServer, loop_answers, probe
from guard.sidecar.telemetry.exposition import FAMILIES, LABEL, MergedRegistry

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    _Connection = Connection[Any, Any]

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PASSED_ON = (*_SIGNALS, signal.SIGHUP)
"""Signals that the parent passes on, and that the workers themselves ignore."""
_STOP, _RELOAD = b"stop", b"reload"
_ANSWER_SECONDS = 1.0
"""Seconds that a process may take to answer a scrape or a readiness probe."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a process that ended is restarted: at first, and at most. They double each time."""
_STEADY_SECONDS = 60.0
"""Seconds after which a process counts as stable, so that the pauses begin again at the first."""


@dataclass(frozen=True)
class Worker:
    """What one of several processes knows about itself.

    The function that runs in the process configures its log, loads the models, and then

    1. listens at `listen` with the gRPC option `grpc.so_reuseport` 1, without checking whether the port is free (the
       other processes use it), and only when it can serve at once: from then on the kernel assigns connections to it,
    2. opens a `ProbeServer` at `probes`,
    3. calls `announce`, and writes nothing to standard output,
    4. drains when `stopping` is set, as it would at a signal, and returns. It installs no signal handlers. It reads its
       files again when `stopping` says so.

    A `GuardError` that it raises is sent to the parent, which reports it.

    Attributes:
        index: The number of the process, from 0. It stays the same if the process is restarted, so that files can be
            named after it.
        listen: HOST:PORT for inference; the port is never 0.
        probes: unix:PATH for `/metrics`, `/healthz` and `/readyz`.
        parent: The connection to the parent; it ends when the parent ends.
    """

    index: int
    listen: str
    probes: str
    parent: "_Connection"

    @property
    def shares_port(self) -> bool:
        """Always true: the other processes listen at the same port."""
        return True

    def announce(self, line: Mapping[str, Any]) -> None:
        """Report that requests are served.

        Args:
            line: What a process alone would write to standard output, as values that JSON can represent.
        """
        with suppress(OSError):  # the parent is gone, which `stopping` reports
            self.parent.send(dict(line))

    def stopping(self, on_reload: Callable[[], object] = lambda: None) -> asyncio.Event:
        """An event of the running loop that is set at each signal to end the parent, and when the parent is gone.

        Args:
            on_reload: Called on the running loop at each SIGHUP to the parent.
        """
        event, loop = asyncio.Event(), asyncio.get_running_loop()

        def follow() -> None:
            with suppress(RuntimeError):  # the loop is closed
                try:
                    while True:
                        stop = self.parent.recv_bytes() == _STOP
                        loop.call_soon_threadsafe(event.set if stop else on_reload)
                except (EOFError, OSError):
                    loop.call_soon_threadsafe(event.set)

        threading.Thread(target=follow, name="guard-parent", daemon=True).start()
        return event


def supervise(target: Callable[[Worker], None], *, count: int, listen: str, metrics: str) -> None:
    """Run several processes on one port until SIGTERM or SIGINT; then all of them drain.

    When every process serves, one line is written to standard output: that of the first process, with the address of
    the parent's own `metrics` and with the number of `processes`. At that address, `/metrics` has the metrics of all
    processes (`MergedRegistry`). `/readyz` reports whether at least one process serves and all that serve are ready.
    `/healthz` reports whether no event loop hangs; a process that has ended does not matter there, since it is
    restarted without ending the others, after pauses that grow from 0.5 s to 30 s.

    Only the parent handles signals, and passes them on; at SIGHUP the processes read their files again. If the parent
    is killed, the processes drain.

    Args:
        target: The function that runs in each process, see `Worker`. Each process is a new interpreter, so the function
            must be importable, or be a `functools.partial` of an importable one with arguments that can be pickled.
        count: Number of processes.
        listen: HOST:PORT for inference; port 0 lets the system choose.
        metrics: HOST:PORT of the parent's HTTP port; port 0 lets the system choose.

    Raises:
        UsageError: `listen` is a Unix socket, `listen` or `metrics` is taken, or the system has no SO_REUSEPORT.
        GuardError: A process could not start, in which case the others are killed, or did not drain.
    """
    if socket_path(listen) is not None:
        raise UsageError("several processes can share a port, not a Unix socket; give --listen HOST:PORT")
    with _reserve(listen) as reserved, _folder() as folder, asyncio.Runner() as runner:
        address = f"{listen.rpartition(':')[0]}:{reserved.getsockname()[1]}"
        runner.run(_Parent(target, count, address, folder).run(metrics))


def _reserve(listen: str) -> socket.socket:
    """Reserve a port for processes of this user that set SO_REUSEPORT.

    The socket never listens, so it gets no connections. It is first bound without sharing, which fails if any process
    listens at the port, and only then set to share the port.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise UsageError("this system cannot share a port among processes (SO_REUSEPORT); give --processes 1")
    host, port = split_address(listen)
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            reserved = socket.socket(family, kind)
            try:
                # Connections of an earlier server in TIME_WAIT are no reason to fail.
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                reserved.bind(place)
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            except OSError:
                reserved.close()
            else:
                return reserved
    raise UsageError(f"cannot listen on {listen}: the port is taken or the address is not of this machine")


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder that only this user can read, deleted at the end."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="guard-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UsageError(
            f"the folder for sockets cannot be created ({error.strerror}); set TMPDIR to a folder that can be written"
        ) from error
    with folder as name:
        yield Path(name)


def _run(target: Callable[[Worker], None], worker: Worker) -> None:
    """Run the function of a worker in its process."""
    # The parent passes signals on, so a signal to the whole process group would count twice.
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    try:
        target(worker)
    except GuardError as error:
        with suppress(OSError):
            worker.parent.send(error)
        sys.exit(error.exit_code)


class _Parent:
    """Starts, watches, queries and stops the processes.

    Attributes:
        registry: The metrics of all processes.
    """

    def __init__(self, target: Callable[[Worker], None], count: int, listen: str, folder: Path) -> None:
        self._target, self._count, self._listen, self._folder = target, count, listen, folder
        self._context = multiprocessing.get_context("spawn")
        own = CollectorRegistry()
        Gauge("guard_processes_configured", "Processes that are configured.", registry=own).set(count)
        self._restarts = Counter(
            "guard_process_restarts", "Restarts of processes that ended unexpectedly.", [LABEL], registry=own
        )
        for index in range(count):
            self._restarts.labels(index)
        self.registry = MergedRegistry(self._metrics, own)
        self._stopping = asyncio.Event()
        self._children: dict[int, tuple[SpawnProcess, _Connection]] = {}
        self._serving: dict[int, Path] = {}  # replaced and never modified, since other threads read it
        self._lines: dict[int, dict[str, Any]] = {}
        self._complete = False
        self._undrained: list[str] = []

    async def run(self, metrics: str) -> None:
        """Run until all processes have ended."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        with ProbeServer(metrics, self, self, lambda: loop_answers(loop) and self._alive()) as probes:
            keepers = [asyncio.ensure_future(self._keep_running(index, probes.address)) for index in range(self._count)]
            try:
                await asyncio.gather(*keepers)
            finally:
                for keeper in keepers:
                    keeper.cancel()
                await asyncio.gather(*keepers, return_exceptions=True)
        if self._undrained:
            raise GuardError("; ".join(self._undrained))

    def _stop(self) -> None:
        """Pass a signal on to the processes; kill those that do not serve yet, since they have nothing to drain."""
        self._stopping.set()
        for index, (process, connection) in self._children.items():
            if index in self._serving:
                with suppress(OSError):  # the process has ended
                    connection.send_bytes(_STOP)
            else:
                process.kill()

    def _reload(self) -> None:
        """Pass the signal on to the processes that serve; those that start read their files anyway."""
        for index, (_, connection) in self._children.items():
            if index in self._serving:
                with suppress(OSError):  # the process has ended
                    connection.send_bytes(_RELOAD)

    async def _keep_running(self, index: int, metrics: str) -> None:
        """Keep one process running until the sidecar stops."""
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            try:
                served = await self._run_once(index, metrics)
            except OSError as error:  # the system has no room for a process
                if not self._complete:
                    raise GuardError(f"process {index} could not start: {error.strerror}") from error
                log.warning("process %d could not start and is tried again: %s", index, error.strerror)
                served = 0.0
            if served >= _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
                return
            self._restarts.labels(index).inc()
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _run_once(self, index: int, metrics: str) -> float:
        """Run one process from start to end; return the number of seconds for which it served."""
        path = self._folder / f"{index}.sock"
        path.unlink(missing_ok=True)  # a process that was killed leaves its socket
        clock, since = asyncio.get_running_loop().time, None
        ours, theirs = self._context.Pipe()
        with ours:
            with theirs:
                process = self._start(Worker(index, self._listen, f"unix:{path}", theirs))
            self._children[index] = process, ours
            try:
                await _readable(ours.fileno())
                said = _received(ours)
                if isinstance(said, dict):
                    since, self._serving = clock(), {**self._serving, index: path}
                    self._announce(index, said, metrics)
                await _readable(process.sentinel)
                error = said if isinstance(said, GuardError) else _received(ours)
            finally:
                self._serving = {other: place for other, place in self._serving.items() if other != index}
                del self._children[index]
                process.kill()  # does nothing if the process has ended
                process.join()
        how = error or _describe_end(process.exitcode)
        if self._stopping.is_set():
            if since is not None and process.exitcode:
                self._undrained.append(f"process {index} did not drain: {how}")
        elif since is None and not self._complete:
            raise error or GuardError(f"process {index} could not start: {how}")
        else:
            log.error("process %d ended, and is started again: %s", index, how)
        return 0.0 if since is None else clock() - since

    def _start(self, worker: Worker) -> SpawnProcess:
        process = self._context.Process(target=_run, args=(self._target, worker), name=f"guard-{worker.index}")
        # A worker ignores signals from its first moment. The start of multiprocessing's tracker unblocks them, so it is
        # started before.
        ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    def _announce(self, index: int, line: dict[str, Any], metrics: str) -> None:
        """Write one line for all processes, the first time that all of them serve."""
        self._lines[index] = line
        if self._complete or len(self._lines) < self._count:
            return
        self._complete = True
        sys.stdout.write(json.dumps({**self._lines[0], "metrics": metrics, "processes": self._count}) + "\n")
        sys.stdout.flush()

    @property
    def reason(self) -> str | None:
        """Why inference requests are not served; None if they are."""
        answers = self._ask("/readyz", _ANSWER_SECONDS)
        if not answers:
            return "no process serves" if self._complete else "guard is starting"
        for index, (status, body) in answers.items():
            if status != HTTPStatus.OK:
                with suppress(KeyError, ValueError):
                    return f"process {index}: {json.loads(body)['reason']}"
                return f"process {index} does not answer"
        return None

    def _alive(self) -> bool:
        """Whether no process hangs; a process that has ended does not count, since it is restarted."""
        answers = self._ask("/healthz", LOOP_SECONDS + _ANSWER_SECONDS)
        return all(status == HTTPStatus.OK for status, _ in answers.values())

    def _metrics(self) -> dict[str, bytes]:
        answers = self._ask("/metrics", _ANSWER_SECONDS, FAMILIES)
        return {str(index): body for index, (status, body) in answers.items() if status == HTTPStatus.OK}

    def _ask(self, target: str, seconds: float, accept: str = "*/*") -> dict[int, tuple[int, bytes]]:
        """The answers of all processes that serve, asked at the same time; GATEWAY_TIMEOUT if one does not answer."""

        def ask(path: Path) -> tuple[int, bytes]:
            with suppress(OSError, ValueError):
                return probe(path, target, seconds=seconds, accept=accept)
            return HTTPStatus.GATEWAY_TIMEOUT, b""

        asked = dict(sorted(self._serving.items()))
        if not asked:
            return {}
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = dict(zip(asked, pool.map(ask, asked.values()), strict=True))
        # A process that has ended meanwhile does not count as one that does not answer.
        return {index: answer for index, answer in answers.items() if index in self._serving}


async def _readable(descriptor: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)


def _received(connection: "_Connection") -> Any:  # noqa: ANN401 - a line or an error
    """The line or the error that a worker has sent; None if it has sent nothing."""
    with suppress(EOFError, OSError):
        if connection.poll():
            return connection.recv()
    return None


def _describe_end(code: int | None) -> str:
    """How a process ended, for people."""
    if code is not None and code < 0:
        return f"it was killed by signal {-code}"
    return f"it ended with code {code}"
