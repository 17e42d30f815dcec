"""Calls that pass through to the upstream server: messages as bytes; metadata, deadline and status as they are."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import grpc
from google.protobuf.message import DecodeError

from guard.protocol import DESCRIBING_METHODS, SERVICE
from guard.protocol.inference_pb2 import ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse
from guard.sidecar.inference.calls import Context, Metadata, RefusedError
from guard.sidecar.policy import Reason
from guard.sidecar.settings import Settings
from guard.sidecar.transport.channels import Endpoint, open_async_channel
from guard.sidecar.transport.loops import shielded
from guard.sidecar.transport.tls import client_credentials

UNARY = (*DESCRIBING_METHODS, "ModelInfer")
"""The methods that are known to take and return one message."""
_HOP = frozenset({"user-agent", "te", "content-type", "grpc-accept-encoding", "grpc-encoding", "grpc-timeout"})
"""Metadata that belongs to one hop and is not passed on."""
_BROKEN_OFF = "Internal error from Core"
"""What gRPC's asynchronous client says of a stream whose connection broke while it wrote (grpc/grpc#36066)."""
_PROBE_SECONDS = 2.0
_END_SECONDS = 1.0
"""That what reads from a cancelled call is given to end by itself."""
_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError)
"""What writing to a call raises whose status is known already."""


def upstream_endpoint(settings: Settings) -> Endpoint:
    """The upstream server that the settings name.

    Raises:
        UsageError: A file for TLS cannot be used.
    """
    if settings.upstream is None:
        raise ValueError("the settings name no upstream server")
    credentials = client_credentials(settings.upstream_tls, settings.upstream_certificate, settings.upstream_key)
    return Endpoint(settings.upstream, credentials, settings.upstream_server_name)


class Replies:
    """The way back of a stream to its client, for more than one writer: gRPC takes one thing at a time.

    Args:
        context: Of the client's call.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.idle = asyncio.Lock()
        """Held while something is written. What is cancelled then leaves a call that cannot be ended any more."""
        self._begun = False

    async def begin(self, initial: Metadata) -> None:
        """Send initial metadata, unless a message went out before them."""
        async with self.idle:
            if not self._begun:
                self._begun = True
                await self._context.send_initial_metadata(initial)

    async def send(self, message: bytes) -> None:
        """Send a message."""
        async with self.idle:
            self._begun = True
            await self._context.write(message)


class Proxy:
    """The connection to the upstream server.

    Args:
        settings: With an upstream.
    """

    def __init__(self, settings: Settings) -> None:
        endpoint = upstream_endpoint(settings)
        self._address = endpoint.address
        self._channel = open_async_channel(
            endpoint,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                # A server that restarts is found again within seconds, not after gRPC's default of two minutes.
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.initial_reconnect_backoff_ms", 200),
            ],
        )
        self._unary = {f"/{SERVICE}/{name}": self._channel.unary_unary(f"/{SERVICE}/{name}") for name in UNARY}

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def ready(self) -> bool:
        """Whether the upstream server says that it is ready."""
        try:
            reply = await self._ask("ServerReady", ServerReadyRequest().SerializeToString())
            return bool(ServerReadyResponse.FromString(reply).ready)
        except (grpc.aio.AioRpcError, DecodeError):
            return False

    async def server_name(self) -> str:
        """What the upstream server calls itself; "" if it does not say."""
        try:
            return str(ServerMetadataResponse.FromString(await self._ask("ServerMetadata", b"")).name)
        except (grpc.aio.AioRpcError, DecodeError):
            return ""

    async def _ask(self, name: str, data: bytes) -> bytes:
        reply: bytes = await self._unary[f"/{SERVICE}/{name}"](data, timeout=_PROBE_SECONDS)
        return reply

    async def unary(self, path: str, data: bytes, context: Context) -> tuple[bytes, Metadata]:
        """One message there and one back.

        gRPC's asynchronous calls of this kind read initial metadata and reply in one go, so that is how they arrive.

        Returns:
            The reply and the trailing metadata.

        Raises:
            RefusedError: The call ended with an error.
        """
        method = self._unary.get(path) or self._channel.unary_unary(path)
        call = method(data, metadata=_passed_on(context.invocation_metadata()), timeout=context.time_remaining())
        try:
            reply: bytes = await shielded(call)
        except asyncio.CancelledError:
            _cancel(call)
            raise
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from error
        if initial := _passed_on(await call.initial_metadata()):
            await context.send_initial_metadata(initial)
        return reply, _passed_on(await call.trailing_metadata())

    def stream(self, path: str, context: Context) -> grpc.aio.StreamStreamCall:
        """Open a call for any number of messages each way; `carry` moves them."""
        metadata = _passed_on(context.invocation_metadata())
        return self._channel.stream_stream(path)(metadata=metadata, timeout=context.time_remaining())

    async def relay(self, path: str, requests: AsyncIterator[bytes], context: Context) -> Metadata:
        """A call of any arity, unread: one message is a stream of one.

        Returns:
            The trailing metadata.

        Raises:
            RefusedError: The call ended with an error.
        """
        call, replies = self.stream(path, context), Replies(context)

        async def upwards() -> None:
            async for message in requests:
                await call.write(message)
            await call.done_writing()

        async def downwards() -> None:
            while (reply := await call.read()) is not grpc.aio.EOF:
                await replies.send(reply)

        return await self.carry(call, replies, upwards, downwards)

    async def carry(
        self,
        call: grpc.aio.StreamStreamCall,
        replies: Replies,
        upwards: Callable[[], Awaitable[None]],
        downwards: Callable[[], Awaitable[None]],
    ) -> Metadata:
        """Move the messages of a stream until the upstream server ends it.

        Args:
            call: Upstream.
            replies: To the client.
            upwards: Writes to the call until the client has no more.
            downwards: Reads from it until there is no more.

        Returns:
            The trailing metadata.

        Raises:
            RefusedError: The call ended with an error.
        """

        async def up() -> None:
            with suppress(*_ENDED):
                await upwards()

        async def down() -> None:
            initial = _passed_on(await call.initial_metadata())
            if initial or not call.done():
                # A client may wait for it before it says anything.
                await replies.begin(initial)
            await downwards()

        tasks = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
        ending = tasks[1:]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
            # Where this is cancelled, reading ends by itself, as `_cancel` says.
            await asyncio.shield(tasks[1])
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from error
        except asyncio.CancelledError:
            # The client is gone, so that reading from it ends as well.
            ending = tasks
            raise
        finally:
            _cancel(call)
            await asyncio.wait(ending, timeout=_END_SECONDS)
            async with replies.idle:
                for task in tasks:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return _passed_on(await call.trailing_metadata())

    def _refused(self, error: grpc.aio.AioRpcError) -> RefusedError:
        """An error of the upstream server, for the client."""
        code, details = error.code(), error.details() or ""
        # The upstream server may itself say UNAVAILABLE, over a connection that stands.
        lost = self._channel.get_state() is not grpc.ChannelConnectivity.READY
        if code is grpc.StatusCode.INTERNAL and details == _BROKEN_OFF:
            code, lost = grpc.StatusCode.UNAVAILABLE, True
        if code is grpc.StatusCode.UNAVAILABLE and lost:
            details = f"guard: the upstream server {self._address} cannot be reached ({details})"
        trailing = _passed_on(error.trailing_metadata())
        return RefusedError(code, details, trailing=trailing, reason=Reason.UPSTREAM_FAILED)


def _cancel(call: grpc.aio.Call) -> None:
    """Cancel a call, such that what waits for it ends by itself.

    The public way also cancels the tasks that wait for gRPC; their operations are then never taken back from it, and
    about 1 kB is lost with each cancelled or late call (measured with grpcio 1.85.1 and a bare proxy).
    """
    call._cancel("guard: nobody waits for the reply any more")  # noqa: SLF001 - as said


def _passed_on(metadata: grpc.aio.Metadata | Metadata | None) -> Metadata:
    return tuple((key, value) for key, value in metadata or () if key not in _HOP)
