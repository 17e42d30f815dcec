"""The threads of a sidecar that decode, embed and screen, and the queue before them: both bounded."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Semaphore
from typing import TypeVar

from guard.sidecar.transport.loops import shielded

T = TypeVar("T")


class OverloadedError(Exception):
    """Every worker is busy, and as many requests wait as may."""


class Workers:
    """A bounded pool of threads with a bounded queue, shared by all models.

    numpy, Pillow and ONNX Runtime release the interpreter while they work, so that the event loop keeps serving.

    Args:
        threads: At work at once.
        queue: Most that wait.
    """

    def __init__(self, threads: int, queue: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="guard")
        self._room = Semaphore(threads + queue)

    def close(self) -> None:
        """Let running work end and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def run(self, work: Callable[[], T]) -> T:
        """Run on the pool.

        What nobody waits for any more is skipped when its turn comes, and has its place in the queue until then.

        Raises:
            OverloadedError: There is no place for it.
        """
        if not self._room.acquire(blocking=False):
            raise OverloadedError
        wanted = True

        def run() -> T:
            try:
                if not wanted:
                    raise TimeoutError
                return work()
            finally:
                self._room.release()

        try:
            # The context tells the log which request this is.
            return await shielded(asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, run))
        except asyncio.CancelledError:
            wanted = False
            raise
