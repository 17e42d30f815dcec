"""Where the page gets what it shows: the sidecar itself, or another one's admin service. Both speak in its messages."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from guard.evidence import Record
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.host.reporting import Reporter, told
from guard.sidecar.policy import Decision
from guard.sidecar.transport.channels import Endpoint, open_async_channel

RECENT = 200
"""Records of the evidence log that are shown from before the page began to follow it."""
_CALL_SECONDS = 5.0
_SERVICE = messages.DESCRIPTOR.services_by_name["Sidecar"]
_LONGEST_REPLY = 64 * 2**20
_OPTIONS = (
    ("grpc.max_receive_message_length", _LONGEST_REPLY),
    ("grpc.max_reconnect_backoff_ms", 5000),
    ("grpc.keepalive_time_ms", 60_000),
)


class SourceError(Exception):
    """A sidecar does not answer; it is asked again."""


class Source(Protocol):
    """One process of a sidecar."""

    @property
    def address(self) -> str:
        """What people know it by; "" for the sidecar that serves the page itself."""

    @property
    def sidecar(self) -> str:
        """What it has in common with the other processes of its sidecar, which tell the same records of one log."""

    async def status(self) -> messages.Status:
        """What the process is, and whether it serves."""

    async def models(self, *, with_pictures: bool = False) -> messages.ListModelsResponse:
        """What the models are screened with, and what was decided."""

    async def configuration(self) -> messages.Configuration:
        """The settings in effect."""

    def follow(self) -> AsyncIterator[messages.Evidence]:
        """The newest records of the log, oldest first, then flagged images as they come."""


class Own:
    """The sidecar that serves the page.

    Args:
        reporter: Reports what it is.
    """

    address = sidecar = ""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    async def status(self) -> messages.Status:
        """See `Source`."""
        return await asyncio.to_thread(self._reporter.status)

    async def models(self, *, with_pictures: bool = False) -> messages.ListModelsResponse:
        """See `Source`."""
        return await asyncio.to_thread(self._reporter.models, with_pictures=with_pictures)

    async def configuration(self) -> messages.Configuration:
        """See `Source`."""
        return await asyncio.to_thread(self._reporter.configuration)

    async def follow(self) -> AsyncIterator[messages.Evidence]:
        """See `Source`."""
        recorder = self._reporter.recorder
        with recorder.followed(_is_flag) as follower:
            async for message in told(recorder, follower, _is_flag, recent=RECENT, with_thumbnails=True):
                yield message


class Remote:
    """A sidecar that offers the admin service; to be made and used on one event loop.

    Every method raises `SourceError` if the sidecar does not answer.

    Args:
        endpoint: Its admin address.
        sidecar: The same text for all processes of one sidecar.
    """

    def __init__(self, endpoint: Endpoint, sidecar: str) -> None:
        self._endpoint, self.sidecar = endpoint, sidecar
        self._channel: grpc.aio.Channel | None = None

    @property
    def address(self) -> str:
        """See `Source`."""
        return self._endpoint.address

    async def status(self) -> messages.Status:
        """See `Source`."""
        found: messages.Status = await self._call("GetStatus", messages.GetStatusRequest(), messages.Status)
        return found

    async def models(self, *, with_pictures: bool = False) -> messages.ListModelsResponse:
        """See `Source`."""
        request = messages.ListModelsRequest(include_pictures=with_pictures)
        found: messages.ListModelsResponse = await self._call("ListModels", request, messages.ListModelsResponse)
        return found

    async def configuration(self) -> messages.Configuration:
        """See `Source`."""
        request = messages.GetConfigurationRequest()
        found: messages.Configuration = await self._call("GetConfiguration", request, messages.Configuration)
        return found

    async def follow(self) -> AsyncIterator[messages.Evidence]:
        """See `Source`."""
        request = messages.FollowEvidenceRequest(include_thumbnails=True, recent=RECENT)
        call = self._opened().unary_stream(
            f"/{_SERVICE.full_name}/FollowEvidence", _serialised, messages.Evidence.FromString
        )(request)
        try:
            async for found in call:
                yield found
        except grpc.aio.AioRpcError as error:
            raise SourceError(_described(error)) from error
        finally:
            call.cancel()

    def _opened(self) -> grpc.aio.Channel:
        # A channel belongs to the loop on which it is made.
        if self._channel is None:
            self._channel = open_async_channel(self._endpoint, _OPTIONS)
        return self._channel

    async def _call(self, method: str, request: Any, reply: Any) -> Any:  # noqa: ANN401 - messages of the service
        call = self._opened().unary_unary(f"/{_SERVICE.full_name}/{method}", _serialised, reply.FromString)
        try:
            return await call(request, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise SourceError(_described(error)) from error


def _serialised(message: Any) -> bytes:  # noqa: ANN401 - as above
    data: bytes = message.SerializeToString()
    return data


def _is_flag(record: Record) -> bool:
    return record.decision == Decision.FLAG


def _described(error: grpc.aio.AioRpcError) -> str:
    code = error.code()
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
        return "the sidecar does not answer"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "this is not the --admin address of a sidecar of this version"
    return f"the sidecar answers {code.name}: {error.details()}"
