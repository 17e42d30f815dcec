"""`ModelStreamInfer`, screened message by message."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from guard.protocol.dialects import FINAL, Dialect, StreamDialect, error_reply, opened
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from guard.protocol.tensors import with_output
from guard.sidecar.decisions.routes import Request, Route
from guard.sidecar.inference.proxy import Replies
from guard.sidecar.inference.service import Context, RefusedError, confirm, count_images
from guard.sidecar.policy import FailurePolicy, Mode, Outcome, Reason

if TYPE_CHECKING:
    from guard.sidecar.inference.upstream import UpstreamService

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
        hide: Output that was added to those that it lists, if any.
        check: Its outcome, if that does not come from the reply.
        since: When it came.
        answered: Whether its last reply is there, as far as that can be told.
        error: What it is answered with, instead of being forwarded, as soon as its turn comes.
        counted: Whether its outcome was counted; where there is a check, that does it.
    """

    request: Request
    hide: str | None
    check: asyncio.Future[Outcome] | None
    since: float
    answered: bool = False
    error: bytes | None = None
    counted: bool = False

    @property
    def id(self) -> str:
        return str(self.request.message.id)


class ScreenedStream:
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
        self._unread = service.models.unknown.settings.mode is Mode.SHADOW and all(
            _ignores_replies(served.route) for served in service.models.served
        )
        """Whether nothing depends on the replies, whatever model they are of."""
        self._sent: deque[_Sent] = deque(maxlen=_REMEMBERED)
        self._several, self._hidden = False, set[str]()
        self.route = service.models.unknown
        """Of the request that came last."""
        self._room, self._flushing = asyncio.Semaphore(_AHEAD), asyncio.Lock()

    def give_up(self, reason: Reason) -> None:
        """Count the requests that the end of the stream leaves without a reply."""
        for sent in self._sent:
            self._count(sent, reason)

    def _count(self, sent: _Sent, reason: Reason) -> None:
        """Count a request that was not checked; unless it was, or its check counts it."""
        if not sent.counted and sent.check is None and sent.error is None:
            sent.counted = True
            route = sent.request.route
            images = count_images(sent.request.message, route.settings.input_tensor)
            self._service.observe(Outcome.unchecked(reason), route, images, sent.since)

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
            service.observe(Outcome.unchecked(error.reason or Reason.ERROR), service.models.unknown, 1, started)
            return error
        message, route, check = request.message, request.route, None
        self.route = route
        if (known := service.beforehand(request)) is not None:
            service.observe(known, route, count_images(message, route.settings.input_tensor), started)
            check = asyncio.get_running_loop().create_future()
            check.set_result(known)
        elif route.embeds:
            check = service.start_check(request, service.check_request(request))
        return _Sent(
            Request(_without_contents(message), route, request.trace_id),
            hide=service.to_hide(request) if known is None else None,
            check=check,
            since=started,
        )

    async def _forward(self, data: bytes, sent: _Sent | RefusedError) -> None:
        if isinstance(sent, RefusedError):
            request = Request(ModelInferRequest(), self._service.models.unknown)
            nothing = _Sent(request, hide=None, check=None, since=perf_counter())
            await self._answer(nothing, sent, Outcome.unchecked(sent.reason or Reason.ERROR))
            return
        if sent.check is not None and _checks_first(sent.request.route):
            outcome = await sent.check
            try:
                self._service.enforce(outcome, sent.request.route)
            except RefusedError as error:
                await self._answer(sent, error, outcome)
                return
        if not self._unread:
            if len(self._sent) == _REMEMBERED:
                self._count(self._sent[0], Reason.REPLY_UNMATCHED)
            self._sent.append(sent)
        if sent.hide is not None:
            self._hidden.add(sent.hide)
            data = with_output(data, sent.hide)
        await self.call.write(data)

    async def _answer(self, sent: _Sent, error: RefusedError, outcome: Outcome) -> None:
        """Refuse a request that is not forwarded."""
        sent.error = await self._refused(sent.request, error, outcome, await self._dialect.ask())
        self._sent.append(sent)
        await self._flush()

    async def _refused(
        self,
        request: Request,
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
            error.trailing = (*error.trailing, *self._service.tags(outcome, request.route))
            raise error
        self._service.metrics.refused(error.code.name)
        message = request.message
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
            if found and isinstance(envelope, ModelStreamInferResponse) and envelope.error_message:
                self._count(found[0], Reason.UPSTREAM_FAILED)
            return reply
        outcome = await self._outcome(response, found)
        request = max((sent.request for sent in found), key=_strictness, default=None) or self._stray(response)
        outcome = confirm(outcome, response, request)
        if response is not None:
            guess = request.route
            self._service.models.settle(request, response.model_version)
            if request.route is not guess:
                # It was checked by the profile of another version; the rules of the one that answered hold.
                outcome = max(outcome, Outcome.unchecked(Reason.MODEL_UNKNOWN), key=lambda each: each.severity)
        try:
            self._service.enforce(outcome, request.route)
        except RefusedError as error:
            return await self._refused(request, error, outcome, dialect, response)
        hide = {sent.hide for sent in found if sent.hide} if found else self._hidden
        if envelope is None or response is None or not self._service.edit(response, request, outcome, hide):
            return reply
        return envelope.SerializeToString()

    def _stray(self, response: ModelInferResponse | None) -> Request:
        """A reply that belongs to no request is treated as one of the model that it names."""
        models, name = self._service.models, "" if response is None else response.model_name
        route = models.unknown if response is None else models.route(name, response.model_version)
        only = models.served[0].route if len(models.served) == 1 else models.unknown
        return Request(ModelInferRequest(), only if route is models.unknown else route)

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
        started, requests = perf_counter(), [sent.request for sent in found]
        images = {count_images(request.message, request.route.settings.input_tensor) for request in requests}
        if len(images) == 1 and len({request.route.checker for request in requests}) == 1:
            outcome = await self._service.check_reply(response, requests[0])
            route = requests[0].route
        else:
            outcome, route = Outcome.unchecked(Reason.REPLY_UNMATCHED), self._stray(response).route
        if found:
            found[0].counted = True
        self._service.observe(outcome, route, max(images, default=1), started)
        return outcome


def _strictness(request: Request) -> tuple[bool, bool]:
    """Of the requests that a reply may belong to, whose rules hold."""
    settings = request.route.settings
    return settings.mode is Mode.BLOCK, settings.on_failure is FailurePolicy.CLOSED


def _checks_first(route: Route) -> bool:
    """Whether a request may be refused, so that it is checked before it is forwarded."""
    return route.settings.mode is Mode.BLOCK or route.settings.on_failure is FailurePolicy.CLOSED


def _ignores_replies(route: Route) -> bool:
    """Whether nothing depends on the replies to requests of a model."""
    settings = route.settings
    return route.embeds and settings.mode is Mode.SHADOW and settings.model_version is None


def _without_contents(message: ModelInferRequest) -> ModelInferRequest:
    """What has to be known of a request until its last reply: not its images, which may be many megabytes."""
    light = ModelInferRequest(model_name=message.model_name, model_version=message.model_version, id=message.id)
    for tensor in message.inputs:
        light.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return light
