"""`ModelStreamInfer`, screened message by message."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from guard.sidecar.dialects import FINAL, Dialect, StreamDialect, error_reply, opened
from guard.sidecar.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.sidecar.policy import FailurePolicy, Mode, Outcome, Reason
from guard.sidecar.proxy import Replies
from guard.sidecar.service import Context, RefusedError, count_images
from guard.sidecar.watch import Request

if TYPE_CHECKING:
    from guard.sidecar.upstream import UpstreamService

_AHEAD = 8
"""Requests of one stream that are read before the first of them went on and was checked."""
_REMEMBERED = 256
"""Requests of one stream that replies are matched with."""
_STATUS_HEADER = "triton_grpc_error"
"""With the value `true`, a client of Triton asks for errors as the status of the stream."""


@dataclass(eq=False)
class _Sent:
    """A request of a stream.

    Attributes:
        request: Without contents.
        hide: Whether the embedding was added to its outputs.
        check: Its outcome, if that does not come from the reply.
        answered: Whether its last reply is there, as far as that can be told.
        error: What it is answered with, instead of being forwarded, as soon as its turn comes.
    """

    request: Request
    hide: bool
    check: asyncio.Future[Outcome] | None
    answered: bool = False
    error: bytes | None = None

    @property
    def id(self) -> str:
        return str(self.request.message.id)


class Stream:
    """One call of `ModelStreamInfer`.

    Where guard embeds the images itself and an outcome can lead to a refusal (mode `block` or policy `closed`), a
    request is forwarded after its check, up to `_AHEAD` checks at a time: what is refused has no answer that could
    slip through. Else checks and the upstream server work side by side. Where the embedding comes from the upstream
    server, each reply is checked by the embedding that it carries, and withheld if it is refused.

    Replies are matched with requests to be annotated. In Triton's dialect by id; without ids in the order of the
    requests, as long as no reply says that more will follow. MLServer gives every reply the id of the first request,
    so there it is the order. A reply that may belong to several requests gets the worst of their outcomes. One that
    belongs to none is `unchecked`.

    A refusal takes the place of the reply in Triton's dialect, and the stream goes on; or it ends the stream, if the
    client sent `triton_grpc_error: true`. In MLServer's dialect, which has no room for errors, and in one that is not
    known, it ends the stream.

    Args:
        service: Decides.
        dialect: Of the upstream server.
        call: Upstream.
        context: Of the client's call.
    """

    def __init__(
        self, service: "UpstreamService", dialect: StreamDialect, call: grpc.aio.StreamStreamCall, context: Context
    ) -> None:
        self.call, self.replies = call, Replies(context)
        self._service, self._dialect, self._context = service, dialect, context
        settings = service.settings
        self._check_first = settings.mode is Mode.BLOCK or settings.on_failure is FailurePolicy.CLOSED
        self._unread = service.embeds and settings.mode is Mode.SHADOW and settings.version is None
        """Whether nothing depends on the replies."""
        self._sent: deque[_Sent] = deque(maxlen=_REMEMBERED)
        self._several = self._hidden = False
        self._room, self._flushing = asyncio.Semaphore(_AHEAD), asyncio.Lock()

    async def upwards(self, requests: AsyncIterator[bytes]) -> None:
        """Check and forward the requests, in their order.

        Raises:
            RefusedError: The stream ends with a refusal.
        """
        queue: asyncio.Queue[tuple[bytes, _Sent | RefusedError] | None] = asyncio.Queue()

        async def read() -> None:
            await self._room.acquire()
            async for data in requests:
                queue.put_nowait((data, self._admit(data)))
                await self._room.acquire()

        reading = asyncio.ensure_future(read())
        reading.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (item := await queue.get()) is not None:
                await self._forward(*item)
                self._release(item[1])
            await reading
            await self.call.done_writing()
        finally:
            reading.cancel()

    def _release(self, sent: _Sent | RefusedError) -> None:
        """Let one more request be read, after this one went on and its check ended."""
        if isinstance(sent, _Sent) and sent.check is not None:
            sent.check.add_done_callback(lambda _: self._room.release())
        else:
            self._room.release()

    def _admit(self, data: bytes) -> _Sent | RefusedError:
        """Read a request and start its check."""
        service, started = self._service, perf_counter()
        try:
            request = service.parse(data, self._context)
        except RefusedError as error:
            service.observe(Outcome.unchecked(error.reason or Reason.ERROR), 1, started)
            return error
        message, check = request.message, None
        if (known := service.beforehand(message)) is not None:
            service.observe(known, count_images(message, service.settings.input), started)
            check = asyncio.get_running_loop().create_future()
            check.set_result(known)
        elif service.embeds:
            check = service.start_check(request, service.check_request(request))
        return _Sent(
            Request(_without_contents(message), request.trace_id),
            hide=known is None and service.wants_embedding(message),
            check=check,
        )

    async def _forward(self, data: bytes, sent: _Sent | RefusedError) -> None:
        if isinstance(sent, RefusedError):
            nothing = _Sent(Request(ModelInferRequest()), hide=False, check=None)
            await self._answer(nothing, sent, Outcome.unchecked(sent.reason or Reason.ERROR))
            return
        if sent.check is not None and self._check_first:
            outcome = await sent.check
            try:
                self._service.enforce(outcome)
            except RefusedError as error:
                await self._answer(sent, error, outcome)
                return
        self._hidden |= sent.hide
        if not self._unread:
            self._sent.append(sent)
        await self.call.write(self._service.with_embedding(data) if sent.hide else data)

    async def _answer(self, sent: _Sent, error: RefusedError, outcome: Outcome) -> None:
        """Refuse a request that is not forwarded."""
        sent.error = await self._refused(sent, error, outcome, await self._dialect.ask())
        self._sent.append(sent)
        await self._flush()

    async def _refused(
        self,
        sent: _Sent | None,
        error: RefusedError,
        outcome: Outcome,
        dialect: Dialect | None,
        like: ModelInferResponse | None = None,
    ) -> bytes:
        """A refusal as a message of the stream.

        Raises:
            RefusedError: It is the end of the stream instead.
        """
        metadata = self._context.invocation_metadata() or ()
        if dialect is not Dialect.TRITON or any(pair == (_STATUS_HEADER, "true") for pair in map(tuple, metadata)):
            error.trailing = (*error.trailing, *self._service.tags(outcome))
            raise error
        self._service.metrics.refused(error.code.name)
        message = ModelInferRequest() if sent is None else sent.request.message
        return error_reply(error.message, model=message.model_name, request_id=message.id, like=like)

    async def downwards(self) -> None:
        """Annotate or withhold the replies.

        Raises:
            RefusedError: The stream ends with a refusal.
        """
        while (reply := await self.call.read()) is not grpc.aio.EOF:
            answer = reply if self._unread else await self._reply(reply)
            await self.replies.send(answer)
            await self._flush()
        await self._flush(ended=True)

    async def _flush(self, *, ended: bool = False) -> None:
        """Send the refusals whose turn it is: those with an id, which a client can tell, and those with none ahead."""
        async with self._flushing:
            waiting = False
            for sent in list(self._sent):
                if sent.error is None:
                    waiting |= not sent.answered and not sent.id
                elif ended or sent.id or not waiting:
                    self._sent.remove(sent)
                    await self.replies.send(sent.error)

    async def _reply(self, reply: bytes) -> bytes:
        dialect, response = self._dialect.of(reply), None
        try:
            envelope, response = opened(reply, dialect)
        except DecodeError:
            envelope = None
        found = self._match(response, dialect)
        if response is not None and not response.outputs and not response.raw_output_contents:
            # An error, or the mere end of several replies: no answer.
            return reply
        outcome = self._service.confirm(await self._outcome(response, found), response)
        try:
            self._service.enforce(outcome)
        except RefusedError as error:
            return await self._refused(found[0] if found else None, error, outcome, dialect, response)
        hide = any(sent.hide for sent in found) if found else self._hidden
        if envelope is None or response is None or not self._service.edit(response, outcome, hide=hide):
            return reply
        return envelope.SerializeToString()

    def _match(self, response: ModelInferResponse | None, dialect: Dialect | None) -> list[_Sent]:
        """The requests that a reply may belong to."""
        forwarded = [sent for sent in self._sent if sent.error is None]
        if response is not None and response.id and dialect is not Dialect.MLSERVER:
            # A server may make an id up for a request that has none.
            named = [sent for sent in forwarded if sent.id == response.id] or [s for s in forwarded if not s.id]
        else:
            # A server may not give ids back.
            named = [sent for sent in forwarded if not sent.id] or forwarded
            named = forwarded if dialect is Dialect.MLSERVER else named
        open_ones = [sent for sent in named if not sent.answered]
        final = response.parameters[FINAL].bool_param if response is not None and FINAL in response.parameters else None
        self._several |= final is False or bool(named and not open_ones)
        if open_ones and final is not False:
            open_ones[0].answered = True
        found = open_ones or named
        return found if self._several else found[:1]

    async def _outcome(self, response: ModelInferResponse | None, found: list[_Sent]) -> Outcome:
        checks = [sent.check for sent in found if sent.check is not None]
        if checks:
            return max([await check for check in checks], key=lambda outcome: outcome.severity)
        started, name = perf_counter(), self._service.settings.input
        images = {count_images(sent.request.message, name) for sent in found}
        if len(images) == 1:
            outcome = await self._service.check_reply(response, found[0].request)
        else:
            outcome = Outcome.unchecked(Reason.REPLY_UNMATCHED)
        self._service.observe(outcome, max(images, default=1), started)
        return outcome


def _without_contents(message: ModelInferRequest) -> ModelInferRequest:
    """What has to be known of a request until its last reply: not its images, which may be many megabytes."""
    light = ModelInferRequest(model_name=message.model_name, model_version=message.model_version, id=message.id)
    for tensor in message.inputs:
        light.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return light
