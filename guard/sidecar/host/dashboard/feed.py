"""What the page shows at present: the state of the sidecars, asked again and again, and the newest flagged requests."""

import asyncio
import json
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

from google.protobuf.json_format import Error as JsonError
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from guard.evidence import Record
from guard.evidence.explanation import explained
from guard.evidence.records import MAX_THUMBNAIL
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.host.dashboard import advice
from guard.sidecar.host.dashboard.sources import Source, SourceError

AnyMessage = TypeVar("AnyMessage", bound=Message)

log = logging.getLogger(__name__)

MAX_EVENTS, MAX_BYTES = 500, 16 * 2**20
"""The most flagged images that are kept to be shown, and the most bytes of them; the oldest make room."""
MAX_STATE_BYTES, MAX_EVENT_BYTES, MAX_PICTURE_BYTES = 2**20, 2**18, 2**24
"""The most bytes of each answer of a sidecar, of the JSON of one image, and of all pictures of a sidecar's triggers:
`guard top` shows sidecars that may have been taken over."""
_SEEN = 4 * MAX_EVENTS
_POLL_SECONDS = 2.0
_RETRY_SECONDS = 2.0
HEARTBEAT_SECONDS = 15.0
"""Seconds of silence after which an open stream gets a comment, so that a connection that is gone is noticed."""


@dataclass(frozen=True)
class _Event:
    """A flagged image: how it is sent, and what it is."""

    data: bytes
    source: int
    evidence: messages.Evidence


class Feed:
    """Follows sidecars, and hands out what they report. `run` and `stream` belong to one event loop.

    Args:
        sources: The sidecars, at least one.

    Attributes:
        sources: As given.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        # An id tells a browser that connects again whether this is still the process that it knows.
        self._epoch = secrets.token_hex(4)
        self._events: OrderedDict[int, _Event] = OrderedDict()
        self._bytes, self._last = 0, 0
        # What one sidecar tells must not make what another tells look known.
        self._seen: dict[str, OrderedDict[tuple[object, ...], None]] = {each.sidecar: OrderedDict() for each in sources}
        self._states: list[dict[str, Any]] = [{"address": each.address, "error": "not asked yet"} for each in sources]
        self._settings: list[list[dict[str, Any]]] = [[] for _ in sources]
        self._pictures: list[dict[tuple[str, str], bytes]] = [{} for _ in sources]
        self._pictured: list[tuple[tuple[str, str, int], ...]] = [() for _ in sources]
        self._overview, self._version = json.dumps({"sidecars": self._states}).encode(), 0
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Ask and follow the sidecars until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for number, source in enumerate(self.sources):
                group.create_task(self._poll(number, source))
                group.create_task(self._follow(number, source))

    @property
    def overview(self) -> bytes:
        """The state of the sidecars as JSON; may be called from any thread, as may the methods below but `stream`."""
        return self._overview

    def configuration(self) -> list[dict[str, Any]]:
        """The settings of each sidecar."""
        return [
            {"address": each.address, "settings": settings}
            for each, settings in zip(self.sources, self._settings, strict=True)
        ]

    def picture(self, source: int, model: str, trigger: str) -> bytes | None:
        """The PNG file of a reconstructed trigger; None if there is none.

        Args:
            source: Number of the sidecar.
            model: Label of the model.
            trigger: Id of the trigger.
        """
        return self._pictures[source].get((model, trigger)) if 0 <= source < len(self.sources) else None

    def event(self, identity: str) -> dict[str, Any] | None:
        """A flagged image with sentences that explain it; None if it is no longer kept.

        Args:
            identity: Its id, as `stream` sent it.
        """
        found = self._events.get(self._number(identity) or 0)
        if found is None:
            return None
        shown = json.loads(found.data)
        return {**shown, "id": identity, "explanation_sentences": explained(_record(found.evidence))}

    async def stream(self, last: str) -> AsyncGenerator[bytes]:
        """Server-sent events: `overview` when the state has changed, `evidence` for each flagged image.

        Args:
            last: Id of the last image that the client has seen; "" for a new client, which gets all that are kept.
        """
        yield b"retry: 2000\n\n"
        position = self._number(last)
        if position is None:
            position = 0
            yield b"event: reset\ndata: {}\n\n"
        shown = -1
        while True:
            if shown != self._version:
                shown = self._version
                yield b"event: overview\ndata: " + self._overview + b"\n\n"
            while position < self._last:
                position = max(position + 1, next(iter(self._events), self._last))
                if (event := self._events.get(position)) is not None:
                    yield f"id: {self._epoch}-{position}\nevent: evidence\ndata: ".encode() + event.data + b"\n\n"
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS), self._changed:
                    await self._changed.wait_for(lambda: self._last > position or self._version != shown)  # noqa: B023 - waited for here
            except TimeoutError:
                yield b": still here\n\n"

    def _number(self, identity: str) -> int | None:
        epoch, _, number = identity.partition("-")
        if epoch != self._epoch or not number.isdecimal() or len(number) > 15:
            return None
        return min(int(number), self._last)

    async def _poll(self, number: int, source: Source) -> None:
        while True:
            try:
                state = await self._asked(number, source)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other sidecars must be shown
                self._settings[number] = []  # it may come back with others
                reason = str(error) if isinstance(error, SourceError) else f"tells what cannot be shown: {error}"
                state = {"address": source.address, "error": reason}
            if state != self._states[number]:
                self._states[number] = state
                self._overview = json.dumps({"sidecars": self._states}).encode()
                self._version += 1
                await self._tell()
            await asyncio.sleep(_POLL_SECONDS)

    async def _asked(self, number: int, source: Source) -> dict[str, Any]:
        """The state of a sidecar; raises what it raises, and ValueError if it cannot be shown."""
        status, listed = _bounded(await source.status()), _bounded(await source.models())
        await self._draw(number, source, listed)
        if not self._settings[number]:
            found = await source.configuration()
            self._settings[number] = [_json(each) for each in _bounded(found).settings]
        return self._state(number, status, listed)

    def _state(self, number: int, status: messages.Status, listed: messages.ListModelsResponse) -> dict[str, Any]:
        for model in listed.models:  # JSON leaves out messages that are not there, and the page reads these
            model.verdict.SetInParent()
            model.traffic.SetInParent()
        conditions, shown = [*advice.of_sidecar(status)], _json(listed)
        for model in listed.models:
            conditions += advice.of_model(model, datetime.now(UTC))
        for model in shown["models"]:
            for trigger in model["triggers"]:
                drawn = (model["label"], trigger["id"]) in self._pictures[number]
                asked = {"sidecar": number, "model": model["label"], "trigger": trigger["id"]}
                trigger["picture"] = f"/api/trigger.png?{urlencode(asked)}" if drawn else ""
        return {
            "address": self.sources[number].address,
            "error": None,
            "status": _json(status),
            **shown,
            "conditions": [{**asdict(each), "runbook": f"{advice.RUNBOOKS}/{each.runbook}.md"} for each in conditions],
        }

    async def _draw(self, number: int, source: Source, listed: messages.ListModelsResponse) -> None:
        """Get pictures of the triggers where these have changed."""
        now = tuple((model.label, model.digest, model.loaded_at.ToNanoseconds()) for model in listed.models)
        if now != self._pictured[number]:
            drawn = await source.models(with_pictures=True)
            left, pictures = MAX_PICTURE_BYTES, dict[tuple[str, str], bytes]()
            for model in drawn.models:
                for trigger in model.triggers:
                    if trigger.picture and (left := left - trigger.ByteSize()) >= 0:
                        pictures[model.label, trigger.id] = trigger.picture
            self._pictures[number] = pictures
            self._pictured[number] = now

    async def _follow(self, number: int, source: Source) -> None:
        while True:
            try:
                async with aclosing(source.follow()) as found:  # type: ignore[type-var] # asynchronous generators
                    async for evidence in found:
                        self._add(number, evidence)
                        await self._tell()
            except SourceError:
                pass  # what it was is shown by `_poll`
            except Exception:
                log.exception("the flagged images of %s cannot be followed", source.address or "this sidecar")
            await asyncio.sleep(_RETRY_SECONDS)

    def _add(self, number: int, evidence: messages.Evidence) -> None:
        if len(evidence.thumbnail) > MAX_THUMBNAIL:
            evidence.ClearField("thumbnail")
        try:
            key, data = _key(evidence), json.dumps({"sidecar": number, **_json(evidence)}).encode()
        except (ValueError, JsonError) as error:
            log.warning("a flagged image of %s cannot be shown: %s", self.sources[number].address, error)
            return
        seen = self._seen[self.sources[number].sidecar]
        if key in seen or len(data) > MAX_EVENT_BYTES:
            return
        seen[key] = None
        if len(seen) > _SEEN:
            seen.popitem(last=False)
        self._last += 1
        event = _Event(data, number, evidence)
        self._events[self._last] = event
        self._bytes += len(event.data)
        while len(self._events) > MAX_EVENTS or (self._bytes > MAX_BYTES and len(self._events) > 1):
            _, gone = self._events.popitem(last=False)
            self._bytes -= len(gone.data)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _key(evidence: messages.Evidence) -> tuple[object, ...]:
    """Tells images apart: processes that share a log all tell its newest records, and after a break they come again."""
    time = evidence.time.ToNanoseconds() // 10**6  # the log keeps milliseconds
    return time, evidence.request_id, evidence.model, evidence.image, evidence.input_digest


def _bounded(message: AnyMessage) -> AnyMessage:
    if (size := message.ByteSize()) > MAX_STATE_BYTES:
        raise ValueError(f"it has {size} bytes")
    return message


def _json(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return found


def _record(evidence: messages.Evidence) -> Record:
    """The record of the log that a message was made from, as far as its explanation needs it."""
    return Record(
        evidence.request_id,
        evidence.model,
        evidence.model_digest,
        evidence.image,
        "flag" if evidence.decision == messages.Evidence.DECISION_FLAG else "pass",
        "",
        predicted=evidence.predicted_class,
        p_value=evidence.p_value if evidence.HasField("p_value") else None,
        alpha=evidence.alpha if evidence.HasField("alpha") else None,
        scores=evidence.scores,
        decided_by=evidence.decided_by,
        reference=evidence.reference_class,
        trigger=evidence.trigger,
        target=evidence.target_class,
        second_look=evidence.second_look,
        explanation=evidence.explanation,
    )
