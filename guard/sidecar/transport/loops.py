"""The event loop that a sidecar runs on, and a way to wait for work that must not be cancelled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from guard.errors import MissingDependencyError

T = TypeVar("T")


def loop_factory(loop: Literal["auto", "asyncio", "uvloop"]) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The factory of the event loop; None for the event loop of asyncio.

    Raises:
        MissingDependencyError: uvloop was asked for and is not installed.
    """
    if loop == "asyncio":
        return None
    try:
        import uvloop
    except ModuleNotFoundError as error:
        if loop == "auto":
            return None
        raise MissingDependencyError(
            "--event-loop uvloop needs uvloop; install it with: pip install 'clip-guard[uvloop]'"
        ) from error
    return uvloop.new_event_loop


async def shielded(work: Awaitable[T]) -> T:
    """Wait for work that goes on if the waiting is cancelled; its result or error is then dropped."""
    running = asyncio.ensure_future(work)
    running.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(running)
