"""The interface of engines, and those that need nothing but this machine."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol, TypeVar

from guard._cpus import usable_cpus
from guard._workers import workers

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lost:
    """In place of the result of a task whose process died every time.

    Attributes:
        reason: What is known of why, in one line.
    """

    reason: str


class Engine(Protocol):
    """Runs tasks."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result | Lost]]:
        """Results with the position of their item, in the order in which they finish.

        An exception that the function raises is raised here, and ends the other tasks. Closing the iterator, as an
        interrupt does, cancels what has not begun.
        """


class Serial:
    """One task after the other in this process."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result | Lost]]:
        """See `Engine.map`."""
        for position, item in enumerate(items):
            yield position, function(item)


class Processes:
    """Processes of this machine, each of which lives behind a thread: one that dies loses only its own task.

    Args:
        jobs: Number of processes.
        attempts: How often a task is tried whose process died. A task that kills its process, such as one that needs
            too much memory, does so again: by default it is not tried twice.
    """

    def __init__(self, jobs: int, *, attempts: int = 1) -> None:
        self._jobs, self._attempts = jobs, attempts

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result | Lost]]:
        """See `Engine.map`."""
        if not items:
            return
        jobs = min(self._jobs, len(items))
        threads = max(1, usable_cpus() // jobs)
        free: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()

        def one(item: Item) -> Result | Lost:
            process = free.get()
            try:
                for _ in range(self._attempts):
                    try:
                        return process.submit(function, item).result()
                    except BrokenProcessPool:
                        process.shutdown(wait=False)
                        process = workers(1, threads)
                return Lost("the process that worked on it died; perhaps the machine has too little memory")
            finally:
                free.put(process)

        for _ in range(jobs):
            free.put(workers(1, threads))
        pool = ThreadPoolExecutor(jobs)
        try:
            futures = {pool.submit(one, item): position for position, item in enumerate(items)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not free.empty():
                free.get().shutdown(wait=False, cancel_futures=True)
