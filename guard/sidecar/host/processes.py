"""Several processes on one port: a parent that loads nothing, and workers that share the port's connections.

An interpreter runs one thread of Python at a time; several processes use several cores. The kernel (SO_REUSEPORT) hands
each new *connection* to one of them, by a hash of its addresses, and all requests of that connection stay there. So a
client with one channel keeps one process busy, and a few channels may well meet in one: the load is even when
connections are many, or come from a balancer that opens several. When a process ends, connections that it has not
accepted yet are reset; a client that retries finds another.
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
_ANSWER_SECONDS = 1.0
"""That a process may take to answer a scrape or a question about readiness."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a process that ended is started again, doubled each time."""
_STEADY_SECONDS = 60.0
"""After which a process counts as one that works: the pauses begin anew."""


@dataclass(frozen=True)
class Worker:
    """What one of several processes is told about itself.

    The function that runs in it configures the log of its process, loads what it serves, then

    1. listens at `listen` with the gRPC option `grpc.so_reuseport` 1, without asking first whether the port is free
       (the others have it), and only when it can serve at once: from then on the kernel hands it connections,
    2. opens a `ProbeServer` at `probes`,
    3. calls `announce`, and writes nothing to standard output,
    4. drains when `stopping` is set, as for a signal, and returns. It installs no handlers of signals.

    A `GuardError` that it raises reaches the parent, which says it.

    Attributes:
        index: From 0. It stays the same when a process is started again, so that files can be named for it.
        listen: HOST:PORT for inference; the port is never 0.
        probes: unix:PATH for `/metrics`, `/healthz` and `/readyz`.
        parent: The connection to the parent; its end is the parent's.
    """

    index: int
    listen: str
    probes: str
    parent: "_Connection"

    @property
    def shares_port(self) -> bool:
        """Whether other processes listen at `listen` too: they do."""
        return True

    def announce(self, line: Mapping[str, Any]) -> None:
        """Say that requests are served.

        Args:
            line: What one process alone would write to standard output; values that JSON knows.
        """
        with suppress(OSError):  # the parent is gone, which `stopping` says
            self.parent.send(dict(line))

    def stopping(self) -> asyncio.Event:
        """An event of the running loop: set at each signal that the parent gets, and when the parent is gone."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()

        def follow() -> None:
            with suppress(RuntimeError):  # the loop is closed
                try:
                    while True:
                        self.parent.recv_bytes()
                        loop.call_soon_threadsafe(event.set)
                except (EOFError, OSError):
                    loop.call_soon_threadsafe(event.set)

        threading.Thread(target=follow, name="guard-parent", daemon=True).start()
        return event


def supervise(target: Callable[[Worker], None], *, count: int, listen: str, metrics: str) -> None:
    """Run several processes on one port until SIGTERM or SIGINT; then all drain.

    Writes one line to standard output when every process serves: the first one's, with the address of the parent's own
    `metrics` and with `processes`. There, `/metrics` has the metrics of all processes (`MergedRegistry`);
    `/readyz` says that at least one serves and none of those that do is not ready; `/healthz`, that no event loop
    hangs, since for a process that ended there is a remedy without the death of the others: it is started again, after
    pauses that grow from 0.5 s to 30 s.

    Only the parent follows signals; it passes them on. If it is killed, the processes drain.

    Args:
        target: Runs in each process, which is a new interpreter: it must be importable, or a `functools.partial` of
            what is, with arguments that can be pickled. See `Worker`.
        count: How many processes.
        listen: HOST:PORT for inference; port 0 lets the system choose.
        metrics: HOST:PORT of the parent; port 0 lets the system choose.

    Raises:
        UsageError: `listen` is a Unix socket or taken, or `metrics` is; the system has no SO_REUSEPORT.
        GuardError: A process could not start, in which case the others are killed, or did not drain.
    """
    if socket_path(listen) is not None:
        raise UsageError("several processes can share a port, not a Unix socket; give --listen HOST:PORT")
    with _reserve(listen) as reserved, _folder() as folder, asyncio.Runner() as runner:
        address = f"{listen.rpartition(':')[0]}:{reserved.getsockname()[1]}"
        runner.run(_Parent(target, count, address, folder).run(metrics))


def _reserve(listen: str) -> socket.socket:
    """Keep a port for processes of this user that ask for SO_REUSEPORT.

    The socket never listens, so it gets no connections. It is bound like that of a server that shares with nobody,
    which fails if anybody listens there, and only then made one that shares.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise UsageError("this system cannot share a port among processes (SO_REUSEPORT); give --processes 1")
    host, port = split_address(listen)
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            reserved = socket.socket(family, kind)
            try:
                # Connections of an earlier server that wait for their end are no reason to fail.
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
    """A folder of this user alone, gone at the end."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="guard-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UsageError(f"no folder for sockets can be made ({error.strerror}); set TMPDIR to one for them") from error
    with folder as name:
        yield Path(name)


def _run(target: Callable[[Worker], None], worker: Worker) -> None:
    """The life of a worker."""
    # A signal for the whole group of processes comes from the parent as well, and would count twice.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        target(worker)
    except GuardError as error:
        with suppress(OSError):
            worker.parent.send(error)
        sys.exit(error.exit_code)


class _Parent:
    """Starts, watches, asks and ends the processes.

    Attributes:
        registry: Of all processes.
    """

    def __init__(self, target: Callable[[Worker], None], count: int, listen: str, folder: Path) -> None:
        self._target, self._count, self._listen, self._folder = target, count, listen, folder
        self._context = multiprocessing.get_context("spawn")
        own = CollectorRegistry()
        Gauge("guard_processes_configured", "Processes that there should be.", registry=own).set(count)
        self._restarts = Counter(
            "guard_process_restarts", "Processes that ended unasked and were started again.", [LABEL], registry=own
        )
        for index in range(count):
            self._restarts.labels(index)
        self.registry = MergedRegistry(self._metrics, own)
        self._stopping = asyncio.Event()
        self._children: dict[int, tuple[SpawnProcess, _Connection]] = {}
        self._serving: dict[int, Path] = {}  # replaced and never changed: other threads read it
        self._lines: dict[int, dict[str, Any]] = {}
        self._complete = False
        self._undrained: list[str] = []

    async def run(self, metrics: str) -> None:
        """Until all processes have ended."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        with ProbeServer(metrics, self, self, lambda: loop_answers(loop) and self._alive()) as probes:
            keepers = [asyncio.ensure_future(self._keep(index, probes.address)) for index in range(self._count)]
            try:
                await asyncio.gather(*keepers)
            finally:
                for keeper in keepers:
                    keeper.cancel()
                await asyncio.gather(*keepers, return_exceptions=True)
        if self._undrained:
            raise GuardError("; ".join(self._undrained))

    def _stop(self) -> None:
        """Pass a signal on; what does not serve yet has nothing to drain."""
        self._stopping.set()
        for index, (process, connection) in self._children.items():
            if index in self._serving:
                with suppress(OSError):  # it has ended
                    connection.send_bytes(b"stop")
            else:
                process.kill()

    async def _keep(self, index: int, metrics: str) -> None:
        """Have one process, until none is wanted any more."""
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            try:
                served = await self._live(index, metrics)
            except OSError as error:  # the system has no room for a process
                if not self._complete:
                    raise GuardError(f"process {index} could not start: {error.strerror}") from error
                log.warning("process %d could not start, and is tried again: %s", index, error.strerror)
                served = 0.0
            if served >= _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
                return
            self._restarts.labels(index).inc()
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _live(self, index: int, metrics: str) -> float:
        """One process from its start to its end; for how many seconds it served."""
        path = self._folder / f"{index}.sock"
        path.unlink(missing_ok=True)  # of a process that was killed
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
                process.kill()  # nothing, if it has ended
                process.join()
        how = error or _end(process.exitcode)
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
        # A worker is deaf to signals from its first moment; the start of multiprocessing's tracker would undo that.
        ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    def _announce(self, index: int, line: dict[str, Any], metrics: str) -> None:
        """One line for all, the first time that all serve."""
        self._lines[index] = line
        if self._complete or len(self._lines) < self._count:
            return
        self._complete = True
        sys.stdout.write(json.dumps({**self._lines[0], "metrics": metrics, "processes": self._count}) + "\n")
        sys.stdout.flush()

    @property
    def reason(self) -> str | None:
        """Why requests are not served; None if they are."""
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
        """Whether no process hangs; one that ended is started again."""
        answers = self._ask("/healthz", LOOP_SECONDS + _ANSWER_SECONDS)
        return all(status == HTTPStatus.OK for status, _ in answers.values())

    def _metrics(self) -> dict[str, bytes]:
        answers = self._ask("/metrics", _ANSWER_SECONDS, FAMILIES)
        return {str(index): body for index, (status, body) in answers.items() if status == HTTPStatus.OK}

    def _ask(self, target: str, seconds: float, accept: str = "*/*") -> dict[int, tuple[int, bytes]]:
        """What each process that serves answers, all asked at once; GATEWAY_TIMEOUT for one that does not."""

        def ask(path: Path) -> tuple[int, bytes]:
            with suppress(OSError, ValueError):
                return probe(path, target, seconds=seconds, accept=accept)
            return HTTPStatus.GATEWAY_TIMEOUT, b""

        asked = dict(sorted(self._serving.items()))
        if not asked:
            return {}
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = dict(zip(asked, pool.map(ask, asked.values()), strict=True))
        # One that has ended meanwhile is not one that does not answer.
        return {index: answer for index, answer in answers.items() if index in self._serving}


async def _readable(descriptor: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)


def _received(connection: "_Connection") -> Any:  # noqa: ANN401 - a line or an error
    """What a worker has said; None if that is nothing."""
    with suppress(EOFError, OSError):
        if connection.poll():
            return connection.recv()
    return None


def _end(code: int | None) -> str:
    """An exit code, for people."""
    if code is not None and code < 0:
        return f"it was killed by signal {-code}"
    return f"it ended with code {code}"
