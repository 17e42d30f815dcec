"""Back-pressure: calls, streams and bytes beyond the limits are refused at once and not queued.

A call passes three stages. It waits for its first message, which it must send soon; it is refused or admitted when the
message is there; and it is handled. Calls in the first stage never keep others out: the one that has waited longest
makes room. Messages are read here and not by gRPC, which would read them before anybody could refuse.
"""

import asyncio
import ctypes
import inspect
import logging
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import grpc

from guard.sidecar.decisions.inputs import LARGE_PIXELS
from guard.sidecar.inference.calls import RefusedError
from guard.sidecar.policy import Reason
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics

PROBE_BYTES = 2**16
"""The longest message of a health check, and of the other methods of a sidecar's own."""
_LARGE_SHARE = 32
"""Messages beyond one part of so many of all bytes in flight are large: they must leave half of that to others."""
_SWEEP_SECONDS = 0.1
"""Seconds between two looks at what waits, and at the memory in use."""
_TIDY_SECONDS = 1.0
"""The least seconds between two times that free memory is given back: the C library keeps it, in pieces."""
_QUIET_SECONDS, _LONGEST_WAIT_SECONDS = 0.2, 1.0
"""Seconds without a new call after which no more are expected; and the most seconds that are spent waiting for that."""
_BYTES_PER_PIXEL = 20
"""Of an image that is decoded, measured: 17 for WebP, 12 for a progressive JPEG in four colours, and 4 for a copy."""
_COPIES = 3
"""Of each message: as bytes, as a parsed message, and while one is made from the other."""
_ARRIVING = 16
"""Messages of the largest size that may arrive, faster than anybody looks, between two looks at the memory in use."""
_UNTAKEN_OF_ONE, _UNTAKEN_OF_ALL, _UNTAKEN_OF_ONE_IF_MANY = 64, 1024, 4
"""Replies that one connection may leave untaken; the number of all from which on it is the last of these."""
_NO_ROOM = "the messages that are being answered take up all memory for them; try again later"
_ENDING = "this sidecar is shutting down; try another one"
Handler = Callable[[Any, grpc.aio.ServicerContext], Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bounds:
    """The limits of some methods.

    Attributes:
        calls: Calls that are handled at a time.
        streams: Streams at a time, which count as calls too once they have sent a message.
        message_bytes: Of the longest message.
        inflight_bytes: Of all messages that are handled, and of their replies.
        first_message: Seconds in which a call must send its first message.
        idle: Seconds for which a stream may be silent in both directions.
        memory: Bytes of memory in use from which on nothing more is taken; None for no such limit.
        tidy: Bytes of memory in use from which on memory that is free is given back to the system.
    """

    calls: int
    streams: int
    message_bytes: int
    inflight_bytes: int
    first_message: float
    idle: float
    memory: int | None = None
    tidy: int = 0

    @classmethod
    def of(cls, settings: Settings) -> "Bounds":
        """The limits of inference; call it when the models are loaded, since the memory in use then counts."""
        resting = resident_bytes()
        memory = most_memory(settings, resting) - _ARRIVING * settings.max_message_bytes
        return cls(
            settings.max_concurrent,
            settings.max_streams,
            settings.max_message_bytes,
            settings.inflight_bytes,
            settings.first_message_timeout,
            settings.stream_idle_timeout,
            memory,
            (resting + memory) // 2,
        )

    @classmethod
    def of_probes(cls, settings: Settings) -> "Bounds":
        """The limits of health checks and reflection, which have a reserve of their own."""
        # Who watches the health of a sidecar may hear nothing for weeks.
        return cls(64, 32, PROBE_BYTES, 64 * PROBE_BYTES, settings.first_message_timeout, idle=math.inf)

    @property
    def outer(self) -> int:
        """Calls of one connection at a time: those that are handled, those that wait, and as many being refused."""
        return self.streams + 3 * self.waiting

    @property
    def waiting(self) -> int:
        """Calls that may wait for their first message at a time: the messages of as many may come at once."""
        return max(64, self.calls)


def most_memory(settings: Settings, resting: int) -> int:
    """The most memory that one process of a sidecar uses, in bytes, besides what the model takes for a forward pass.

    Args:
        settings: Settings of the sidecar.
        resting: What it uses when its models are loaded and no request is there.
    """
    large_threads = max(1, settings.workers - 1)
    pixels = large_threads * settings.max_pixels + (settings.workers - large_threads) * LARGE_PIXELS
    messages = _COPIES * settings.inflight_bytes + _ARRIVING * settings.max_message_bytes
    return resting + _BYTES_PER_PIXEL * pixels + messages


def resident_bytes() -> int:
    """Memory that this process has in use; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _give_back() -> None:
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


class Limited(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Limits calls, streams and bytes; what is beyond a limit ends with RESOURCE_EXHAUSTED and is counted.

    Args:
        handlers: The handlers that are limited.
        bounds: The limits.
        metrics: Metrics of the sidecar, where refusals are counted.

    Attributes:
        bounds: As given.
    """

    def __init__(self, handlers: grpc.GenericRpcHandler, bounds: Bounds, metrics: Metrics) -> None:
        self._handlers, self.bounds, self._metrics = handlers, bounds, metrics
        self._running = self._bytes = 0
        self._waiting: dict[_Call, float] = {}
        self._open_streams: set[_Call] = set()
        self._short_of_memory = False
        self._untaken = _Untaken(bounds.inflight_bytes)
        self._evictions: set[asyncio.Task[None]] = set()
        self._holding, self._released = False, asyncio.Event()
        self._call_arrived = asyncio.Event()

    async def watch(self) -> None:
        """End calls that say nothing, and look at the memory in use, until cancelled."""
        tidied = 0.0
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = monotonic()
            for call in [call for call, since in self._waiting.items() if now - since > self.bounds.first_message]:
                self._evict(call, grpc.StatusCode.DEADLINE_EXCEEDED, _silent(self.bounds.first_message))
            for call in [call for call in self._open_streams if now - call.last > self.bounds.idle]:
                self._evict(call, grpc.StatusCode.DEADLINE_EXCEEDED, _silent(self.bounds.idle))
            if self.bounds.memory is not None:
                if resident_bytes() > self.bounds.tidy and now - tidied > _TIDY_SECONDS:
                    tidied = now
                    await asyncio.to_thread(_give_back)
                self._look_at_memory(self.bounds.memory)

    def _look_at_memory(self, most: int) -> None:
        self._short_of_memory = resident_bytes() > most
        if self._short_of_memory:
            # What they have sent so far lies in buffers of gRPC, and is given back with them.
            for call in tuple(self._waiting):
                self._evict(call, grpc.StatusCode.RESOURCE_EXHAUSTED, "the memory for requests is used up")

    @property
    def trouble(self) -> str | None:
        """Why a request that came now would be refused; None if it would be taken."""
        if self._running >= self.bounds.calls:
            return f"{self.bounds.calls} requests are being answered, and no more are taken"
        if self._short_of_memory or self._bytes >= self.bounds.inflight_bytes:
            return "the memory for requests is used up"
        return None

    async def hold(self) -> None:
        """Let new calls wait until `release`, while running calls go on; return when no more calls seem to arrive."""
        self._holding = True
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_WAIT_SECONDS):
                while True:
                    self._call_arrived.clear()
                    try:
                        async with asyncio.timeout(_QUIET_SECONDS):
                            await self._call_arrived.wait()
                    except TimeoutError:
                        return

    def release(self) -> None:
        """End the calls that wait, for this or for their first message, with UNAVAILABLE."""
        self._released.set()
        for call in tuple(self._waiting):
            self._evict(call, grpc.StatusCode.UNAVAILABLE, _ENDING)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a call, within the limits: it reads its messages itself, whatever its arity."""
        handler = self._handlers.service(details)
        if handler is None:
            return None
        arity = "_".join(
            "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
        )
        limited = self._within_limits(getattr(handler, arity), handler)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(limited, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(limited, None, handler.response_serializer)

    def _within_limits(self, method: Handler, handler: grpc.RpcMethodHandler) -> Handler:
        read, streams = handler.request_deserializer or bytes, handler.request_streaming

        async def request(call: "_Call") -> Any:  # noqa: ANN401 - a message of any method, or messages
            return _messages(call, read) if streams else read(await call.only_message())

        if inspect.isasyncgenfunction(method):

            async def stream(_: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:  # noqa: ANN401
                try:
                    async with (
                        self._admitted(context, streams=True) as call,
                        aclosing(method(await request(call), call)) as replies,
                    ):
                        async for reply in replies:
                            yield reply
                except grpc.aio.AbortError as error:
                    raise _without_frames(error)  # noqa: B904 - that is what it is without

            return stream

        async def answer(_: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: ANN401 - of any method
            try:
                async with self._admitted(context, streams=handler.response_streaming) as call:
                    reply = await method(await request(call), call)
                    if isinstance(reply, bytes):
                        await self.take(call, len(reply), received=False)
                        call.reply = len(reply)
                    self._untaken.add(call)
                    return reply
            except grpc.aio.AbortError as error:
                raise _without_frames(error)  # noqa: B904 - as above

        return answer

    @asynccontextmanager
    async def _admitted(self, context: grpc.aio.ServicerContext, *, streams: bool) -> "AsyncIterator[_Call]":
        if self._holding:
            self._call_arrived.set()
            await self._released.wait()
            await self.refuse(context, grpc.StatusCode.UNAVAILABLE, _ENDING)
        call = _Call(context, self, streams=streams)
        if not self._untaken.allow(call.peer):
            message = "this connection does not take the replies to its calls; read them first"
            await self.refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        if streams and len(self._open_streams) >= self.bounds.streams and not self._evict_oldest(streams=True):
            await self.refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self.bounds.streams} streams are open, and no more are taken; try again later",
            )
        if streams:
            self._open_streams.add(call)
        if len(self._waiting) >= self.bounds.waiting:
            self._evict_oldest()
        self._waiting[call] = call.last
        try:
            yield call
        finally:
            self._waiting.pop(call, None)
            self._open_streams.discard(call)
            self._running -= call.begun
            # A reply is held until the client has taken it.
            self.give(call, call.taken - call.reply)
            call.ended = True
            context.add_done_callback(lambda _: self._taken(call))

    def _taken(self, call: "_Call") -> None:
        """A call is over: its reply has left, or never will."""
        self._untaken.remove(call)
        self._bytes -= call.taken
        call.taken = 0

    async def begin(self, call: "_Call") -> None:
        """Count a call as handled, when its first message is there."""
        self._waiting.pop(call, None)
        if self._running >= self.bounds.calls:
            message = f"{self.bounds.calls} requests are being answered, and no more are taken; try again later"
            await self.refuse(call, grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        call.begun = True
        self._running += 1

    async def take(self, call: "_Call", size: int, *, received: bool) -> None:
        """Count bytes that are held for a call, of a message that was received or of a reply."""
        if size > self.bounds.message_bytes:
            most = self.bounds.message_bytes
            await self.refuse(call, grpc.StatusCode.RESOURCE_EXHAUSTED, f"the message is longer than {most} bytes")
        most = self.bounds.inflight_bytes
        if received and size > most // _LARGE_SHARE:
            most = max(size, most // 2)
            if self.bounds.memory is not None:
                self._look_at_memory(self.bounds.memory)
        if self._short_of_memory or self._bytes + size > most:
            await self.refuse(call, grpc.StatusCode.RESOURCE_EXHAUSTED, _NO_ROOM)
        self.give(call, -size)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more can be held."""
        return not self._short_of_memory and self._bytes + size <= self.bounds.inflight_bytes

    def give(self, call: "_Call", size: int) -> None:
        """Count bytes as no longer held; at its end, a call gives back all that it has."""
        if not call.ended:
            call.taken -= size
            self._bytes -= size

    async def refuse(self, context: "grpc.aio.ServicerContext | _Call", code: grpc.StatusCode, message: str) -> None:
        """Count a refusal and end the call with it; raises what gRPC raises then."""
        self._metrics.refused(code.name)
        await context.abort(code, f"guard: {message}")

    def _evict_oldest(self, *, streams: bool = False) -> bool:
        """Make room by a call that waits for its first message; return whether there is one.

        It is the oldest of the connection with the most such calls: in a burst, the message of a call may be there and
        not read yet, and one client's burst must not end the call of another.
        """
        waiting = [call for call in self._waiting if call.streams or not streams]
        by_peer = Counter(call.peer for call in waiting)
        most = max(by_peer.values(), default=0)
        oldest = next((call for call in waiting if by_peer[call.peer] == most), None)
        if oldest is not None:
            message = "too many calls wait for their first message; send it together with the call"
            self._evict(oldest, grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        return oldest is not None

    def _evict(self, call: "_Call", code: grpc.StatusCode, message: str) -> None:
        """End a call from outside: its own read then ends."""
        self._waiting.pop(call, None)
        self._open_streams.discard(call)
        call.evicted = True

        async def end() -> None:
            with suppress(Exception):  # it may have ended meanwhile
                await self.refuse(call, code, message)

        task = asyncio.ensure_future(end())
        self._evictions.add(task)
        task.add_done_callback(self._evictions.discard)


class _Untaken:
    """The replies that gRPC has and that their clients have not taken, by connection.

    gRPC tells nobody about them, and a client may read nothing for ever. So a connection that leaves replies untaken
    gets no more, and gets them sooner if all connections together leave many; others do not notice.

    Args:
        inflight_bytes: Of all messages and replies that are handled at a time.
    """

    def __init__(self, inflight_bytes: int) -> None:
        self._most_bytes = inflight_bytes // 8
        self._of: dict[str, dict[_Call, None]] = {}
        self._total = 0

    def allow(self, peer: str) -> bool:
        """Whether a connection may send another call."""
        own = self._of.get(peer, {})
        most = _UNTAKEN_OF_ONE if self._total < _UNTAKEN_OF_ALL else _UNTAKEN_OF_ONE_IF_MANY
        return len(own) < most and sum(call.reply for call in own) <= self._most_bytes

    def add(self, call: "_Call") -> None:
        """A reply is handed to gRPC."""
        self._of.setdefault(call.peer, {})[call] = None
        self._total += 1

    def remove(self, call: "_Call") -> None:
        """A call is over."""
        own = self._of.get(call.peer, {})
        if call in own:
            del own[call]
            self._total -= 1
        if not own:
            self._of.pop(call.peer, None)


class _Call:
    """The context of a call, with its reads and writes within the limits; all else is gRPC's own.

    Attributes:
        streams: Whether it has any number of messages.
        last: When something was last read or written.
        peer: The connection of its client.
        taken: Bytes that are held for it.
        reply: Of these the bytes of its reply.
        begun: Whether its first message is there.
        evicted: Whether it was ended from outside.
        ended: Whether it holds nothing any more.
    """

    def __init__(self, context: grpc.aio.ServicerContext, limited: Limited, *, streams: bool) -> None:
        self._context, self._limited = context, limited
        self.streams, self.last, self.taken, self.reply = streams, monotonic(), 0, 0
        self.peer = str(context.peer())
        self.begun = self.evicted = self.ended = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the context has
        return getattr(self._context, name)

    async def read(self) -> Any:  # noqa: ANN401 - bytes, or the mark of the end
        """The next message, or `grpc.aio.EOF`."""
        message = await self._context.read()
        self.last = monotonic()
        if self.evicted:
            raise asyncio.CancelledError
        if message is grpc.aio.EOF:
            return message
        if not self.begun:
            await self._limited.begin(self)
        await self._limited.take(self, len(message), received=True)
        return message

    async def only_message(self) -> bytes:
        """The message of a call that has one."""
        message = await self.read()
        if message is grpc.aio.EOF:
            await self._limited.refuse(self, grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        return message  # type: ignore[no-any-return]

    async def write(self, message: Any) -> None:  # noqa: ANN401 - bytes, or a message of a method of our own
        """Send a message, which counts until gRPC has taken it."""
        self.last, size = monotonic(), len(message) if isinstance(message, bytes) else 0
        await self._limited.take(self, size, received=False)
        try:
            await self._context.write(message)
        finally:
            self.forget(size)
            self.last = monotonic()

    def hold(self, size: int) -> None:
        """Count bytes that are made for a call, such as images that take the place of smaller files.

        Raises:
            RefusedError: They are beyond the limit.
        """
        if not self._limited.has_room(size):
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"guard: {_NO_ROOM}", reason=Reason.OVERLOADED)
        self._limited.give(self, -size)

    def forget(self, size: int) -> None:
        """Count bytes as no longer held: a stream does so for each message that it has dealt with."""
        self._limited.give(self, size)


def _without_frames(error: grpc.aio.AbortError) -> grpc.aio.AbortError:
    """An error without the frames that it came through: gRPC keeps it with the call, and they keep call and message.

    Only the collector of such circles would free the message, and it counts objects and not megabytes.
    """
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


async def _messages(call: _Call, read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    """The messages of a stream, for methods that take an iterator."""
    while (message := await call.read()) is not grpc.aio.EOF:
        yield read(message)
        call.forget(len(message))


def _silent(seconds: float) -> str:
    return f"no message came within {seconds:g} s"
