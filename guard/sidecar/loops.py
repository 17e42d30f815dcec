"""Which event loop a sidecar runs on."""

import asyncio
from collections.abc import Callable
from typing import Literal

from guard.errors import MissingDependencyError


def loop_factory(loop: Literal["auto", "asyncio", "uvloop"]) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop; None for asyncio's own.

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
        raise MissingDependencyError("--loop uvloop needs uvloop; pip install 'clip-guard[uvloop]'") from error
    return uvloop.new_event_loop
