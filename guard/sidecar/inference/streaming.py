"""Screening of `ModelStreamInfer`, message by message."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import perf_counter

import grpc

from guard.errors import RequestError
from guard.protocol.dialects import ERRORS_AS_STATUS, FINAL, Dialect, StreamDialect, StreamReply, error_reply
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from guard.protocol.messages import remove_own_names, with_output
from guard.protocol.wire import REPLY_LIMITS, STREAM_REPLY, check_message
from guard.sidecar.decisions.checking import Prepared
from guard.sidecar.decisions.routes import Request, Route
from guard.sidecar.inference.annotations import edit_reply
from guard.sidecar.inference.calls import Context, RefusedError
from guard.sidecar.inference.proxy import Replies
from guard.sidecar.inference.screener import (
    Check,
    Screener,
    confirm,
    count_images,
    enforce,
    output_to_hide,
    tags,
)
from guard.sidecar.policy import FailurePolicy, Mode, Outcome, Reason

_READ_AHEAD = 8
"""The most requests of one stream that have been read and not yet forwarded and checked."""
_REMEMBERED = 256
"""The most requests of one stream that are kept to match replies with."""


@dataclass(eq=False)
class _Sent:
    """A request of a stream.

    Attributes:
        request: The request without its contents.
        hide: The output that guard added to those that the request lists, if any.
        check: The check that gives the outcome; None if the outcome comes from the reply.
        since: When the request arrived, by `perf_counter`.
        answered: Whether its last reply has arrived, as far as that can be told.
        error: The error message that answers the request, in its turn, instead of it being forwarded.
        counted: Whether its outcome was counted; where there is a check, the check counts it.
        images: The check that knows which images are forwarded, until they are.
        data: The request as it was sent, until it is forwarded.
        preparing: What is known of its images when it is done, where the embeddings come from the reply.
        kept: Bytes of what is prepared, until it is answered.
        mixed: Whether another request of the stream has the same id, so that a reply may belong to either.
    """

    request: Request
    hide: str | None
    check: asyncio.Future[Outcome] | None
    since: float
    answered: bool = False
    error: bytes | None = None
    counted: bool = False
    images: Check | None = None
    data: bytes = b""
    preparing: asyncio.Future[Prepared] | None = None
    kept: int = 0
    mixed: bool = False

    @property
    def id(self) -> str:
        return str(self.request.message.id)


class ScreenedStream:
    """One call of `ModelStreamInfer`.

    Where guard embeds the images itself and an outcome can lead to a refusal (mode `block` or policy `closed`), a
    request is forwarded only after its check, with up to `_READ_AHEAD` checks at a time, so that no answer to a refused
    request can reach the client. Otherwise the checks and the upstream server work at the same time. Where the
    embedding comes from the upstream server, each reply is checked by the embedding that it carries, and withheld if
    its request is refused.

    Replies are matched with requests so that they can be annotated. In Triton's dialect this is done by id; requests
    without ids are matched in their order, as long as no reply says that more replies will follow. MLServer gives every
    reply the id of the first request, so its replies are always matched in order. A reply that may belong to several
    requests gets the worst of their outcomes. A reply that belongs to no request is `unchecked`.

    In Triton's dialect a refusal takes the place of the reply and the stream goes on, unless the client sent
    `triton_grpc_error: true`: then the refusal ends the stream. It also ends the stream in MLServer's dialect, which
    has no room for errors, and as long as the dialect is unknown.

    Args:
        screener: Screens the requests.
        dialect: The dialect of the upstream server.
        call: The call to the upstream server.
        context: The context of the client's call.

    Attributes:
        call: As given.
        replies: The way back to the client.
        route: The route of the request that arrived last.
    """

    def __init__(
        self, screener: Screener, dialect: StreamDialect, call: grpc.aio.StreamStreamCall, context: Context
    ) -> None:
        self.call, self.replies = call, Replies(context)
        self._screener, self._dialect, self._context = screener, dialect, context
        self._replies_unread = screener.models.unknown.settings.mode is Mode.SHADOW and all(
            _ignores_replies(served.route) for served in screener.models.served
        )
        """Whether nothing depends on the replies, whichever model they are of."""
        self._sent: deque[_Sent] = deque(maxlen=_REMEMBERED)
        self._several_replies, self._hidden = False, set[str]()
        """Whether one request may get several replies; and all outputs that guard added to requests."""
        self.route = screener.models.unknown
        self._model: tuple[str, str] | None = None
        """Name and version of the model that the first request is for."""
        self._room, self._flushing = asyncio.Semaphore(_READ_AHEAD), asyncio.Lock()

    def give_up(self, reason: Reason) -> None:
        """Count the requests that get no reply because the stream has ended."""
        for sent in self._sent:
            self._count(sent, reason)
            self._free(sent)

    def _free(self, sent: _Sent) -> None:
        """Drop what is known of the images of a request, because nothing more depends on it."""
        if sent.preparing is not None:
            sent.preparing.cancel()
        self._context.forget(sent.kept)
        sent.preparing, sent.kept = None, 0

    def _count(self, sent: _Sent, reason: Reason) -> None:
        """Count a request as unchecked, unless it is counted already or its check counts it."""
        if not sent.counted and sent.check is None and sent.error is None:
            sent.counted = True
            route = sent.request.route
            images = count_images(sent.request.message, route.settings.input_tensor)
            self._screener.observe(Outcome.unchecked(reason), route, images, sent.since)

    async def upwards(self, requests: AsyncIterator[bytes]) -> None:
        """Check and forward the requests, in their order.

        Args:
            requests: The serialised requests that the client sends.

        Raises:
            RefusedError: The stream ends with a refusal.
        """
        queue: asyncio.Queue[tuple[_Sent | RefusedError, int] | None] = asyncio.Queue()

        async def read() -> None:
            await self._room.acquire()
            async for data in requests:
                queue.put_nowait((await self._admit(data), len(data)))
                await self._room.acquire()

        reading = asyncio.ensure_future(read())
        reading.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (item := await queue.get()) is not None:
                await self._forward(item[0])
                self._release(*item)
            await reading
            await self.call.done_writing()
        finally:
            reading.cancel()

    def _release(self, sent: _Sent | RefusedError, size: int) -> None:
        """Allow one more request to be read as soon as this one was forwarded and its check has ended."""

        def release(_: object) -> None:
            self._room.release()
            self._context.forget(size)

        running = None if not isinstance(sent, _Sent) else sent.check or sent.preparing
        if running is not None:
            running.add_done_callback(release)
        else:
            release(None)

    async def _admit(self, data: bytes) -> _Sent | RefusedError:
        """Parse a request and start its check."""
        screener, started = self._screener, perf_counter()
        try:
            request = screener.parse(data, self._context)
        except RefusedError as error:
            screener.observe(Outcome.unchecked(error.reason or Reason.ERROR), screener.models.unknown, 1, started)
            return error
        message, route, check, images, preparing = request.message, request.route, None, None, None
        self.route = route
        known = await self._outcome_of_other_model(message) or screener.outcome_without_check(request)
        if known is not None:
            screener.observe(known, route, count_images(message, route.settings.input_tensor), started)
            check = asyncio.get_running_loop().create_future()
            check.set_result(known)
        elif route.embeds:
            images = Check(request)
            check = screener.start_check(request, images.outcome())
        else:
            images, preparing = screener.start_preparation(request)
        return _Sent(
            Request(_without_contents(message), b"", route, request.trace_id),
            hide=output_to_hide(request) if known is None else None,
            check=check,
            since=started,
            images=images,
            data=request.data,
            preparing=preparing,
        )

    async def _outcome_of_other_model(self, message: ModelInferRequest) -> Outcome | None:
        """The outcome of a request for another model than that of the stream; None if a stream may have several.

        MLServer answers all requests of a stream with the model of the first one.
        """
        model = (message.model_name, message.model_version)
        self._model = self._model or model
        if model == self._model or await self._dialect.ask() is Dialect.TRITON:
            return None
        return Outcome.unchecked(Reason.MODEL_UNKNOWN, "the stream began with another model")

    async def _forward(self, sent: _Sent | RefusedError) -> None:
        if isinstance(sent, RefusedError):
            request = Request(ModelInferRequest(), b"", self._screener.models.unknown)
            unreadable = _Sent(request, hide=None, check=None, since=perf_counter())
            await self._answer(unreadable, sent, Outcome.unchecked(sent.reason or Reason.ERROR))
            return
        if sent.check is not None and _checks_first(sent.request.route):
            outcome = await sent.check
            try:
                enforce(outcome, sent.request.route)
            except RefusedError as error:
                await self._answer(sent, error, outcome)
                return
        data, made = sent.data, 0
        running = sent.check or sent.preparing
        if sent.images is not None and running is not None:
            try:
                data = await sent.images.data(running)
            except RefusedError as error:
                outcome = Outcome.unchecked(error.reason or Reason.ERROR)
                self._count(sent, error.reason or Reason.ERROR)
                await self._answer(sent, error, outcome)
                return
            made = 0 if data is sent.data else len(data)
            self._context.hold(made)
        if sent.images is not None and sent.preparing is not None:
            kept = self._screener.prepared_bytes(sent.request, len(data))
            self._context.hold(kept)
            sent.kept = kept
        # It may be many megabytes, and is not needed until the reply.
        sent.data, sent.images = b"", None
        if not self._replies_unread:
            if len(self._sent) == _REMEMBERED:
                self._count(self._sent[0], Reason.REPLY_UNMATCHED)
                self._free(self._sent[0])
            for other in self._sent:
                if sent.id and other.id == sent.id and not other.answered:
                    other.mixed = sent.mixed = True
            self._sent.append(sent)
        if sent.hide is not None:
            self._hidden.add(sent.hide)
            data = with_output(data, sent.hide)
        await self.call.write(data)
        self._context.forget(made)

    async def _answer(self, sent: _Sent, error: RefusedError, outcome: Outcome) -> None:
        """Answer a request with a refusal instead of forwarding it."""
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

        Args:
            request: The request that is refused.
            error: The refusal.
            outcome: The outcome of the request.
            dialect: The dialect of the stream; None if it is unknown.
            like: The reply that the message replaces, if there is one.

        Raises:
            RefusedError: The refusal ends the stream instead.
        """
        metadata = self._context.invocation_metadata() or ()
        if dialect is not Dialect.TRITON or any(pair == (ERRORS_AS_STATUS, "true") for pair in map(tuple, metadata)):
            error.trailing = (*error.trailing, *tags(outcome, request.route))
            raise error
        self._screener.metrics.refused(error.code.name)
        message = request.message
        return error_reply(error.message, model=message.model_name, request_id=message.id, like=like)

    async def downwards(self) -> None:
        """Annotate the replies and send them to the client, or withhold them.

        Raises:
            RefusedError: The stream ends with a refusal.
        """
        while (reply := await self.call.read()) is not grpc.aio.EOF:
            answer = self._without_own_names(reply) if self._replies_unread else await self._reply(reply)
            await self.replies.send(answer)
            await self._flush()
        await self._flush(ended=True)

    async def _flush(self, *, ended: bool = False) -> None:
        """Send the refusals whose turn has come.

        Those of requests with an id can be sent at any time; those without an id wait for the replies before them.
        """
        async with self._flushing:
            waiting = False
            for sent in list(self._sent):
                if sent.error is None:
                    waiting |= not sent.answered and not sent.id
                elif ended or sent.id or not waiting:
                    self._sent.remove(sent)
                    await self.replies.send(sent.error)

    def _read(self, data: bytes) -> StreamReply | None:
        """A message of the upstream server; None if it cannot be read whole, or is too dear to parse."""
        try:
            check_message(data, STREAM_REPLY, REPLY_LIMITS)
        except RequestError:
            return None
        return self._dialect.read(data)

    def _without_own_names(self, data: bytes) -> bytes:
        """A reply that nothing depends on, without parameters and outputs that have names of guard's own."""
        if (reply := self._read(data)) is None:
            return data
        return reply.message.SerializeToString() if remove_own_names(reply.response) else data

    async def _reply(self, data: bytes) -> bytes:
        reply = self._read(data)
        response = None if reply is None else reply.response
        if response is not None:
            remove_own_names(response)
        dialect = await self._dialect.ask() if reply is None or reply.dialect is None else reply.dialect
        found = self._match(response, dialect)
        if reply is not None and not reply.answers:
            # An error, or only the mark that ends several replies: there is no answer to check.
            if found and isinstance(reply.message, ModelStreamInferResponse) and reply.message.error_message:
                self._count(found[0], Reason.UPSTREAM_FAILED)
                self._free(found[0])
            return bytes(reply.message.SerializeToString())
        outcome = await self._outcome(response, found, dialect)
        request = max((sent.request for sent in found), key=_strictness, default=None) or self._stray(response)
        outcome = confirm(outcome, response, request)
        if response is not None:
            assumed = request.route
            self._screener.models.settle(request, response.model_version)
            if request.route is not assumed:
                # It was checked with the profile of another version; the policy of the version that answered applies.
                outcome = outcome.doubted(Reason.MODEL_UNKNOWN)
        try:
            enforce(outcome, request.route)
        except RefusedError as error:
            return await self._refused(request, error, outcome, dialect, response)
        if reply is None:
            return data
        hide = {sent.hide for sent in found if sent.hide} if found else self._hidden
        edit_reply(reply.response, outcome, request.route.settings.mode, hide)
        return bytes(reply.message.SerializeToString())

    def _stray(self, response: ModelInferResponse | None) -> Request:
        """A stand-in for the request of a reply that belongs to none: its route is that of the model in the reply."""
        models, name = self._screener.models, "" if response is None else response.model_name
        route = models.unknown if response is None else models.route(name, response.model_version)
        only = models.served[0].route if len(models.served) == 1 else models.unknown
        return Request(ModelInferRequest(), b"", only if route is models.unknown else route)

    def _match(self, response: ModelInferResponse | None, dialect: Dialect | None) -> list[_Sent]:
        """The requests that a reply may belong to."""
        forwarded = [sent for sent in self._sent if sent.error is None]
        if response is not None and response.id and dialect is not Dialect.MLSERVER:
            # A server may invent an id for a request that has none.
            named = [sent for sent in forwarded if sent.id == response.id] or [s for s in forwarded if not s.id]
        else:
            # A server may leave the ids out of its replies.
            named = [sent for sent in forwarded if not sent.id] or forwarded
            named = forwarded if dialect is Dialect.MLSERVER else named
        open_ones = [sent for sent in named if not sent.answered]
        final = response.parameters[FINAL].bool_param if response is not None and FINAL in response.parameters else None
        self._several_replies |= final is False or bool(named and not open_ones)
        if open_ones and final is not False:
            open_ones[0].answered = True
        found = open_ones or named
        return found if self._several_replies else found[:1]

    async def _outcome(
        self, response: ModelInferResponse | None, found: list[_Sent], dialect: Dialect | None
    ) -> Outcome:
        checks = [sent.check for sent in found if sent.check is not None]
        if checks:
            return max([await check for check in checks], key=lambda outcome: outcome.severity)
        started, requests = perf_counter(), [sent.request for sent in found]
        images = {count_images(request.message, request.route.settings.input_tensor) for request in requests}
        if len(images) == 1 and len({request.route.checker for request in requests}) == 1:
            # An embedding of one image must not be joined with what the reference model answers to another.
            single = len(found) == 1 and (not found[0].mixed or dialect is Dialect.MLSERVER)
            preparing = found[0].preparing if single else None
            outcome = await self._screener.check_reply(response, requests[0], preparing)
            route = requests[0].route
        else:
            outcome, route = Outcome.unchecked(Reason.REPLY_UNMATCHED), self._stray(response).route
        if found:
            found[0].counted = True
            if found[0].answered:
                self._free(found[0])
        self._screener.observe(outcome, route, max(images, default=1), started)
        return outcome


def _strictness(request: Request) -> tuple[bool, bool]:
    """Sort key of requests by their policy; of those that a reply may belong to, the policy of the largest applies."""
    settings = request.route.settings
    return settings.mode is Mode.BLOCK, settings.on_failure is FailurePolicy.CLOSED


def _checks_first(route: Route) -> bool:
    """Whether a request is checked before it is forwarded, because it may be refused."""
    return route.settings.mode is Mode.BLOCK or route.settings.on_failure is FailurePolicy.CLOSED


def _ignores_replies(route: Route) -> bool:
    """Whether nothing depends on the replies to requests of a model."""
    settings = route.settings
    return route.embeds and settings.mode is Mode.SHADOW and settings.model_version is None


def _without_contents(message: ModelInferRequest) -> ModelInferRequest:
    """A request without its images, which may be many megabytes: what is kept of it until its last reply."""
    light = ModelInferRequest(model_name=message.model_name, model_version=message.model_version, id=message.id)
    for tensor in message.inputs:
        light.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return light
