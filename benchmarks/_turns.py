"""Requests to several servers that take turns, so that they meet the same machine, and what their times say."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks._hops import NO_LIMIT
from guard.protocol import SERVICE
from guard.sidecar.transport.loops import loop_factory

Times = NDArray[np.float64]
Call = Callable[[bytes], Awaitable[bytes]]

WARM_UP = 20
DEADLINE_SECONDS = 60.0
SETTLE_SECONDS = 0.01
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, by bootstrap over rounds."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, statistic: Callable[[NDArray[np.int64]], float], rounds: int, *, seed: int = 0) -> "Estimate":
        """Of a statistic of some rounds, which takes their numbers."""
        generator = np.random.default_rng(seed)
        values = [statistic(generator.integers(0, rounds, rounds)) for _ in range(RESAMPLES)]
        low, high = np.quantile(values, [0.025, 0.975])
        return cls(statistic(np.arange(rounds)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Target:
    """Where a request goes.

    Attributes:
        address: HOST:PORT.
        method: Of the service.
        settle: Whether work goes on after the reply; the next request then waits for `SETTLE_SECONDS`.
    """

    address: str
    method: str = "ModelInfer"
    settle: bool = False


class Client:
    """Sends requests as bytes, and reads no reply. It runs on the event loop that a sidecar takes by default.

    Args:
        targets: By name.
        messages: Sent by turns.
        seed: Of the order.
    """

    def __init__(self, targets: Mapping[str, Target], messages: Sequence[bytes], *, seed: int) -> None:
        self._targets, self._messages = targets, messages
        self._generator = np.random.default_rng(seed)

    def latency(self, rounds: int) -> dict[str, Times]:
        """Milliseconds of one request to each target, shape [rounds] each; the order within a round is random."""
        with asyncio.Runner(loop_factory=loop_factory("auto")) as runner:
            return runner.run(self._latency(rounds))

    def throughput(self, blocks: int, seconds: float, concurrency: int) -> dict[str, Times]:
        """Requests per second, shape [blocks] each; the order of the targets within a round of blocks is random."""
        with asyncio.Runner(loop_factory=loop_factory("auto")) as runner:
            return runner.run(self._throughput(blocks, seconds, concurrency))

    async def _latency(self, rounds: int) -> dict[str, Times]:
        times: dict[str, list[float]] = {name: [] for name in self._targets}
        async with self._calls() as calls:
            for number in range(rounds):
                for name in self._order():
                    started = time.perf_counter()
                    await calls[name](self._messages[number % len(self._messages)])
                    times[name].append(1000 * (time.perf_counter() - started))
                    if self._targets[name].settle:
                        await asyncio.sleep(SETTLE_SECONDS)
        return _arrays(times)

    async def _throughput(self, blocks: int, seconds: float, concurrency: int) -> dict[str, Times]:
        rates: dict[str, list[float]] = {name: [] for name in self._targets}
        async with self._calls() as calls:
            for _ in range(blocks):
                for name in self._order():
                    rates[name].append(await self._rate(calls[name], seconds, concurrency))
        return _arrays(rates)

    @asynccontextmanager
    async def _calls(self) -> AsyncIterator[Mapping[str, Call]]:
        """A connection to each target, used before."""
        async with AsyncExitStack() as stack:
            calls: dict[str, Call] = {}
            for name, target in self._targets.items():
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(target.address, options=NO_LIMIT))
                calls[name] = _with_deadline(channel.unary_unary(f"/{SERVICE}/{target.method}"))
            for number in range(WARM_UP):
                for call in calls.values():
                    await call(self._messages[number % len(self._messages)])
            yield calls

    def _order(self) -> Iterator[str]:
        names = list(self._targets)
        return (names[index] for index in self._generator.permutation(len(names)))

    async def _rate(self, call: Call, seconds: float, concurrency: int) -> float:
        started = time.perf_counter()

        async def send(first: int) -> int:
            count = 0
            while time.perf_counter() - started < seconds:
                await call(self._messages[(first + count) % len(self._messages)])
                count += 1
            return count

        answered = sum(await asyncio.gather(*(send(first) for first in range(concurrency))))
        return answered / (time.perf_counter() - started)


def _with_deadline(method: grpc.aio.UnaryUnaryMultiCallable) -> Call:
    async def call(message: bytes) -> bytes:
        reply: bytes = await method(message, timeout=DEADLINE_SECONDS)
        return reply

    return call


def _arrays(values: Mapping[str, list[float]]) -> dict[str, Times]:
    return {name: np.array(items) for name, items in values.items()}
