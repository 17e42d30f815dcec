"""Forwarding of calls to the upstream server: messages as bytes; metadata, deadline and status unchanged."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import grpc
from google.protobuf.message import DecodeError

from guard.protocol import DESCRIBING_METHODS, SERVICE
from guard.protocol.dialects import ERRORS_AS_STATUS
from guard.protocol.inference_pb2 import ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse
from guard.sidecar.inference.calls import INFER, STREAM, Context, Metadata, RefusedError
from guard.sidecar.policy import Reason
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.tracing import client_span
from guard.sidecar.transport.channels import Endpoint, open_async_channel
from guard.sidecar.transport.loops import shielded
from guard.sidecar.transport.tls import client_credentials

UNARY = (*DESCRIBING_METHODS, "ModelInfer")
"""The methods that are known to take and return one message."""
_HOP_BY_HOP = frozenset({"user-agent", "te", "content-type", "grpc-accept-encoding", "grpc-encoding", "grpc-timeout"})
"""Metadata keys that concern one connection only, and are not passed on."""
_PASSED_ON = (
    *("authorization", "traceparent", "tracestate", "baggage", "grpc-trace-bin", "grpc-tags-bin", "b3", "x-b3-*"),
    *("uber-trace-id", "uberctx-*", "x-cloud-trace-context", "x-datadog-*", "x-ot-span-context", "x-request-id"),
    ERRORS_AS_STATUS,
)
"""Metadata keys of requests that say who asks, or follow the request through a system; a `*` stands for any ending.
Others may choose another model than the one that guard screens for, as `mm-model-id` of ModelMesh and `seldon-model`
do, or another way to read the images."""
_OWN = "guard-"
"""Beginning of the metadata keys that guard itself writes."""
_CONNECTION_BROKE = "Internal error from Core"
"""The status message of gRPC's asynchronous client if a connection breaks while a stream writes (grpc/grpc#36066)."""
_PROBE_SECONDS = 2.0
_END_SECONDS = 1.0
"""Seconds that a task that reads from a cancelled call is given to end by itself."""
_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError)
"""Errors of writing to a call that has ended."""


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
    """Sends messages of a stream to its client, for several writers: gRPC allows one write at a time.

    Args:
        context: The context of the client's call.

    Attributes:
        idle: Held while something is written. If a writer is cancelled then, the call can no longer be ended.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.idle = asyncio.Lock()
        self._begun = False

    async def begin(self, initial: Metadata) -> None:
        """Send initial metadata, unless a message was sent before."""
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
        settings: Settings that name an upstream server.

    Raises:
        UsageError: A file for TLS cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        endpoint = upstream_endpoint(settings)
        self._address = endpoint.address
        passed_on = (*_PASSED_ON, *settings.pass_headers)
        self._keys = frozenset(key for key in passed_on if not key.endswith("*"))
        self._beginnings = tuple(key.removesuffix("*") for key in passed_on if key.endswith("*"))
        self._channel = open_async_channel(
            endpoint,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                # What guard sends may be larger than what it takes: image files become pixels, which count in flight.
                ("grpc.max_send_message_length", -1),
                # Reconnect to a restarted server within seconds, not after gRPC's default of up to two minutes.
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
        """The name in the upstream server's metadata; "" if there is none."""
        try:
            return str(ServerMetadataResponse.FromString(await self._ask("ServerMetadata", b"")).name)
        except (grpc.aio.AioRpcError, DecodeError):
            return ""

    async def _ask(self, name: str, data: bytes) -> bytes:
        reply: bytes = await self._unary[f"/{SERVICE}/{name}"](data, timeout=_PROBE_SECONDS)
        return reply

    async def unary(self, path: str, data: bytes, context: Context) -> tuple[bytes, Metadata]:
        """Forward a call with one message each way.

        gRPC's asynchronous client reads the initial metadata together with the reply, so they are passed on together.

        Args:
            path: Path of the method, `/package.Service/Method`.
            data: The serialised request.
            context: The context of the client's call.

        Returns:
            The reply and the trailing metadata.

        Raises:
            RefusedError: The call ended with an error.
        """
        method = self._unary.get(path) or self._channel.unary_unary(path)
        try:
            with self.hop(path, context) as metadata:
                call = method(data, metadata=metadata, timeout=context.time_remaining())
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

    @contextmanager
    def hop(self, path: str, context: Context) -> Iterator[Metadata]:
        """The metadata of a call to the upstream server, within its span if its requests are screened.

        Args:
            path: Path of the method.
            context: The context of the client's call.
        """
        metadata = self._of_request(context)
        if path not in {INFER, STREAM}:
            yield metadata
            return
        with client_span(path, self._address, metadata) as sent:
            yield sent

    def stream(self, path: str, metadata: Metadata, context: Context) -> grpc.aio.StreamStreamCall:
        """Open a call with any number of messages each way; `carry` moves the messages."""
        return self._channel.stream_stream(path)(metadata=metadata, timeout=context.time_remaining())

    async def relay(self, path: str, requests: AsyncIterator[bytes], context: Context) -> Metadata:
        """Forward a call of any arity unread: a single message is a stream of one.

        Args:
            path: Path of the method, `/package.Service/Method`.
            requests: The serialised messages of the client.
            context: The context of the client's call.

        Returns:
            The trailing metadata.

        Raises:
            RefusedError: The call ended with an error.
        """
        call, replies = self.stream(path, self._of_request(context), context), Replies(context)

        async def upwards() -> None:
            async for message in requests:
                await call.write(message)
                context.forget(len(message))
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
            call: The call to the upstream server.
            replies: The way back to the client.
            upwards: Writes to the call until the client sends no more messages.
            downwards: Reads from the call until it has no more messages.

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
                # A client may wait for initial metadata before it sends anything.
                await replies.begin(initial)
            await downwards()

        tasks = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
        ending = tasks[1:]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
            # If this is cancelled, the read ends by itself; see `_cancel`.
            await asyncio.shield(tasks[1])
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from error
        except asyncio.CancelledError:
            # The client is gone, so reading from it ends by itself as well.
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

    def _of_request(self, context: Context) -> Metadata:
        """The metadata of a request that are passed on."""
        return tuple(
            (key, value)
            for key, value in _passed_on(context.invocation_metadata())
            if key in self._keys or key.startswith(self._beginnings)
        )

    def _refused(self, error: grpc.aio.AioRpcError) -> RefusedError:
        """The refusal that tells the client about an error of the upstream server."""
        code, details = error.code(), error.details() or ""
        # The upstream server itself may answer UNAVAILABLE over a working connection.
        lost = self._channel.get_state() is not grpc.ChannelConnectivity.READY
        if code is grpc.StatusCode.INTERNAL and details == _CONNECTION_BROKE:
            code, lost = grpc.StatusCode.UNAVAILABLE, True
        if code is grpc.StatusCode.UNAVAILABLE and lost:
            details = f"guard: the upstream server {self._address} cannot be reached ({details})"
        trailing = _passed_on(error.trailing_metadata())
        return RefusedError(code, details, trailing=trailing, reason=Reason.UPSTREAM_FAILED)


def _cancel(call: grpc.aio.Call) -> None:
    """Cancel a call in a way that lets the tasks that wait for it end by themselves.

    The public method also cancels the tasks that wait for gRPC. Their operations are then never released, and about
    1 kB leaks with each cancelled or late call (measured with grpcio 1.85.1 and a bare proxy).
    """
    call._cancel("guard: nobody waits for the reply any more")  # noqa: SLF001 - see above


def _passed_on(metadata: grpc.aio.Metadata | Metadata | None) -> Metadata:
    """Metadata without those of one connection only, and without those that only guard may write."""
    return tuple((key, value) for key, value in metadata or () if key not in _HOP_BY_HOP and not key.startswith(_OWN))
