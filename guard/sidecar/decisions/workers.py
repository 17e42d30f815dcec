"""The threads that decode, embed and screen, and the queue of work that waits for them; both are bounded."""

import asyncio
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

CLOSE_SECONDS = 0.5
"""Seconds that work in progress is given to end when the sidecar ends."""
T = TypeVar("T")


class OverloadedError(Exception):
    """Every worker is busy and the queue is full."""


class LargeWorkError(Exception):
    """Work turns out to be large: it is to be put off until one of the threads for such work is free.

    Args:
        rest: What is left to do.
    """

    def __init__(self, rest: Callable[[], Any]) -> None:
        super().__init__("this work is large")
        self.rest = rest


@dataclass(eq=False)
class _Ticket:
    """Whether somebody still waits for a piece of work."""

    awaited: bool = True


@dataclass(eq=False)
class _Job:
    """A piece of work for a thread."""

    work: Callable[[], Any]
    done: asyncio.Future[Any]
    context: Context
    ticket: _Ticket


_current: ContextVar[_Ticket | None] = ContextVar("_current", default=None)


def checkpoint() -> None:
    """End work that nobody waits for any more; to be called between its parts, on a thread of `Workers`.

    Raises:
        TimeoutError: Nobody waits for the work.
    """
    ticket = _current.get()
    if ticket is not None and not ticket.awaited:
        raise TimeoutError


class Workers:
    """A bounded pool of threads with a bounded queue, shared by all models.

    numpy, Pillow and ONNX Runtime release the interpreter lock while they work, so that the event loop keeps serving.
    One thread, if there are several, never takes large work, and an eighth of the queue is the most that large work
    takes, so that ordinary requests are answered while others keep threads busy for seconds.

    The threads do not keep a process alive: work of a library that hangs, or takes a minute, cannot be interrupted.

    Args:
        threads: Number of threads.
        queue: The most requests that wait for a thread.
    """

    def __init__(self, threads: int, queue: int) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._room, self._closed = threads + queue, False
        self._large_room = max(1, threads - 1) + queue // 8
        self._large_threads = asyncio.Semaphore(max(1, threads - 1))
        self._unfinished: set[_Ticket] = set()
        # Started with the first piece of work: a rehearsal of a start needs none.
        self._threads = [Thread(target=self._work, name=f"guard_{n}", daemon=True) for n in range(threads)]
        self._started = False

    @property
    def stuck(self) -> bool:
        """Whether a thread still works; after `close`, it is one that could not be ended."""
        return any(thread.is_alive() for thread in self._threads)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Accept no more work, and wait for the work in progress; see `stuck`.

        Args:
            seconds: The most seconds to wait; work that looks at `checkpoint` ends early.
        """
        deadline, self._closed = monotonic() + seconds, True
        if not self._started:
            return
        for ticket in tuple(self._unfinished):
            ticket.awaited = False
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function on one of the threads.

        Work that is no longer awaited is skipped when its turn comes, ends at its next `checkpoint` if it has begun,
        and keeps its place in the queue until then. Work that raises `LargeWorkError` goes on when a thread for large
        work is free.

        Raises:
            OverloadedError: Every worker is busy and the queue is full.
        """
        try:
            return await self._submit(work)  # type: ignore[no-any-return] # of the work
        except LargeWorkError as large:
            rest = large.rest
        if self._large_room <= 0:
            raise OverloadedError
        self._large_room -= 1
        try:
            await self._large_threads.acquire()
        except BaseException:
            self._large_room += 1
            raise
        return await self._submit(rest, self._large_ended)  # type: ignore[no-any-return] # of the same work

    def _large_ended(self) -> None:
        self._large_room += 1
        self._large_threads.release()

    async def _submit(self, work: Callable[[], Any], ended: Callable[[], None] = lambda: None) -> Any:  # noqa: ANN401
        """Queue work and wait for its result.

        Args:
            work: The work.
            ended: Called on the event loop when the work has ended, which may be after nobody waits for it any more.
        """
        if self._room <= 0 or self._closed:
            ended()
            raise OverloadedError
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        self._room -= 1
        ticket, done = _Ticket(), asyncio.get_running_loop().create_future()
        self._unfinished.add(ticket)

        def finish(done: asyncio.Future[Any]) -> None:
            self._unfinished.discard(ticket)
            self._room += 1
            ended()
            done.exception()  # perhaps nobody else asks for it

        done.add_done_callback(finish)
        # The context carries the ids of the request to the log.
        self._jobs.put(_Job(work, done, copy_context(), ticket))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            ticket.awaited = False
            raise
        finally:
            # An error has the frame of this function, which must not have the error: nobody would free the images.
            del done

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            result = error = None
            try:
                result = job.context.run(_run, job.work, job.ticket)
            except BaseException as raised:  # noqa: BLE001 - whoever waits for the work gets it
                error = raised
            try:
                job.done.get_loop().call_soon_threadsafe(_settle, job.done, result, error)
            except RuntimeError:  # the loop is closed
                return
            del job, result, error  # not until the next job comes


def _run(work: Callable[[], Any], ticket: _Ticket) -> Any:  # noqa: ANN401 - of any work
    _current.set(ticket)
    checkpoint()
    return work()


def _settle(done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:  # noqa: ANN401 - as above
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
