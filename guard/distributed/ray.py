"""Tasks on a Ray cluster."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, TypeVar

from guard.distributed.engine import Lost
from guard.errors import MissingDependencyError, UsageError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

_ATTEMPTS = 4
"""How often a task is tried whose machine or process was lost."""
_CANCEL_SECONDS = 10.0
_REACH_SECONDS = 10.0
"""How long the head of a cluster may take to accept a connection. Ray itself goes on trying for many minutes."""


class Ray:
    """Runs tasks on a Ray cluster whose machines see the same files under the same paths.

    A task is one Ray task, on one processor, and on a GPU if it says so. Ray runs it again on another machine if its
    machine is lost. At most twice as many tasks as there are processors are in flight, so that a set of many shards
    does not fill the memory of the head.

    Args:
        ray: The module.
        gpus: GPUs that each task takes; it may be a part of one.
    """

    def __init__(self, ray: Any, *, gpus: float = 0.0) -> None:  # noqa: ANN401 - an optional dependency
        self._ray, self._gpus = ray, gpus

    @classmethod
    def connect(cls, address: str) -> "Ray":
        """Join a cluster.

        Args:
            address: `HOST:PORT` of its head, or `auto`.

        Raises:
            MissingDependencyError: Ray is not installed.
            UsageError: The address is none, or no cluster answers there.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray: Any = import_module("ray")
        except ImportError:
            raise MissingDependencyError('--ray needs Ray; pip install "clip-guard[ray]"') from None
        if not ray.is_initialized():
            try:
                _reach(address)
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
                raise UsageError(f"no Ray cluster answers at {address}: {first_line(error)}") from error
        return cls(ray, gpus=1.0 if ray.cluster_resources().get("GPU") else 0.0)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result | Lost]]:
        """See `Engine.map`."""
        ray = self._ray
        remote = ray.remote(num_cpus=1, num_gpus=self._gpus, max_retries=_ATTEMPTS - 1)(function)
        most = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
        waiting = list(range(len(items)))[::-1]
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    position = waiting.pop()
                    running[remote.remote(items[position])] = position
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                position = running.pop(done)
                try:
                    yield position, ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    yield position, Lost(f"it was tried {_ATTEMPTS} times: {first_line(error)}")
        finally:
            for task in running:
                ray.cancel(task, force=True)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)


def _reach(address: str) -> None:
    """Connect to the head of a cluster once, so that a wrong address is noticed at once.

    Raises:
        UsageError: The address is none.
        OSError: Nobody listens there.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"{address!r} is not the address of a Ray cluster; give HOST:PORT of its head, or auto")
    with socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS):
        pass
