"""The threads that decode, embed and screen, and the queue of work that waits for them; both are bounded."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Semaphore
from typing import TypeVar

from guard.sidecar.transport.loops import shielded

T = TypeVar("T")


class OverloadedError(Exception):
    """Every worker is busy and the queue is full."""


class Workers:
    """A bounded pool of threads with a bounded queue, shared by all models.

    numpy, Pillow and ONNX Runtime release the interpreter lock while they work, so that the event loop keeps serving.

    Args:
        threads: Number of threads.
        queue: The most requests that wait for a thread.
    """

    def __init__(self, threads: int, queue: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="guard")
        self._room = Semaphore(threads + queue)

    def close(self) -> None:
        """Wait for running work to end and accept no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function on one of the threads.

        Work that is no longer awaited is skipped when its turn comes, and keeps its place in the queue until then.

        Raises:
            OverloadedError: Every worker is busy and the queue is full.
        """
        if not self._room.acquire(blocking=False):
            raise OverloadedError
        awaited = True

        def run() -> T:
            try:
                if not awaited:
                    raise TimeoutError
                return work()
            finally:
                self._room.release()

        try:
            # The context carries the ids of the request to the log.
            return await shielded(asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, run))
        except asyncio.CancelledError:
            awaited = False
            raise
