"""A record of the log, which describes one image, and the filter of a search."""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any

from guard.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

EVIDENCE_FILE = "evidence.sqlite"
"""Name of the log in the folder of a sidecar's state."""
MAX_TEXT = 256
"""Longest text, in characters; request and trace ids come from clients."""
MAX_SENTENCE = 1000
"""Longest explanation, and longest text of a request, in characters."""
MAX_SCORES = 32
MAX_THUMBNAIL = 64 * 2**10
"""Largest encoded thumbnail, in bytes."""

COLUMNS = (
    "id", "time", "request_id", "trace_id", "model", "model_digest", "image", "decision", "mode", "predicted",
    "p_value", "alpha", "scores", "thresholds", "decided_by", "reference", "trigger", "target", "second_look",
     "explanation", "input_digest", "text",
)  # fmt: skip
"""The fields that exports and listings show, in this order: all but the thumbnail."""
NUMBERS = ("p_value", "alpha")
"""Fields that are numbers, or None."""
_TEXTS = tuple(name for name in COLUMNS if name not in {"id", "image", "scores", "thresholds", *NUMBERS})

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_AGO = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Drop(StrEnum):
    """Why a record is lost."""

    CLOSED = "closed"
    """The record came after the log was closed."""
    DAMAGED = "damaged"
    """The file is damaged, or is no longer an evidence log."""
    DISK_FULL = "disk_full"
    ERROR = "error"
    """Any other error; the process's own log has the details."""
    LOCKED = "locked"
    """Another program has locked the file."""
    QUEUE_FULL = "queue_full"
    """Records came faster than they could be written."""


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """A text that is safe in a terminal, a table and a page: bounded, with unprintable characters replaced.

    Unprintable are control characters, line ends, marks that change the direction of writing, and lone surrogates.
    """
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    if short.isprintable():
        return short
    return "".join(character if character.isprintable() else _REPLACEMENT for character in short)


def escaped(text: str) -> str:
    """A text in which characters that cannot be printed are escaped as in a Python string."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def rfc3339(time: datetime) -> str:
    """A time in UTC with milliseconds; these texts sort as the times do."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _now() -> str:
    return rfc3339(datetime.now(UTC))


def _normalised(time: str) -> str:
    """An RFC 3339 time in the form of `rfc3339`; ValueError if it is not one."""
    parsed = datetime.fromisoformat(time)
    try:
        return rfc3339(parsed.replace(tzinfo=parsed.tzinfo or UTC))
    except OverflowError as error:
        raise ValueError(time) from error


@dataclass(frozen=True)
class Record:
    """One image or text of a request, and what guard decided about it.

    Texts are bounded and cleaned when a record is made, whoever makes it: most of them are shown to people, and some
    come from clients.

    Attributes:
        request_id: Id of the request, as the client gave it, or "".
        model: Name under which it is served.
        model_digest: Root digest of the classifier.
        image: Row of the batch, from 0, be it an image or a text.
        decision: `flag`, `pass` or `unchecked`.
        mode: The mode of the sidecar, which says what a decision does: `shadow`, `tag` or `block`.
        time: RFC 3339 time; stored in UTC with milliseconds.
        trace_id: Id of the trace that the request belongs to, or "".
        predicted: Name of the class that the model predicted, or "".
        p_value: Conformal p-value of the image, in [0, 1]; None if there is none, or it is not finite.
        alpha: False-alarm rate that the threshold was set for.
        scores: Scores by name; larger is more suspicious. `divergence` and `residual` say how far the model and the
            reference model are apart (`guard.screening.SecondOpinion`). The first `MAX_SCORES` are kept.
        thresholds: For some of the scores, the threshold above which an image is flagged.
        decided_by: Name of the score that decided, or "".
        reference: Name of the class that the reference model answers, or "" without a second opinion.
        trigger: Id of the trigger that it matches, if the match decided, or "".
        target: Name of the class that the trigger leads to, or "".
        second_look: Outcome of the second look, or "" if there was none.
        explanation: Finding of the second look, as a sentence.
        input_digest: SHA-256 of the input bytes, in hexadecimal.
        text: The text of the input, if it is one, as the model read it; characters that cannot be printed are escaped.
        thumbnail: A small PNG or JPEG file; one of more than `MAX_THUMBNAIL` bytes is left out.
        id: Assigned by the log; 0 before the record is written.

    Raises:
        ValueError: `time` is not an RFC 3339 time.
    """

    request_id: str
    model: str
    model_digest: str
    image: int
    decision: str
    mode: str
    time: str = field(default_factory=_now)
    trace_id: str = ""
    predicted: str = ""
    p_value: float | None = None
    alpha: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    decided_by: str = ""
    reference: str = ""
    trigger: str = ""
    target: str = ""
    second_look: str = ""
    explanation: str = ""
    input_digest: str = ""
    text: str = ""
    thumbnail: bytes | None = field(default=None, repr=False)
    id: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", escaped(self.text[:MAX_SENTENCE]))
        for name in _TEXTS:
            limit = MAX_SENTENCE if name in {"explanation", "text"} else MAX_TEXT
            object.__setattr__(self, name, clean(getattr(self, name), limit))
        object.__setattr__(self, "time", _normalised(self.time))
        for name in NUMBERS:
            value = getattr(self, name)
            object.__setattr__(self, name, float(value) if value is not None and math.isfinite(value) else None)
        for name in ("scores", "thresholds"):
            given: Mapping[str, float] = getattr(self, name)
            kept = {clean(score): float(value) for score, value in islice(given.items(), MAX_SCORES)}
            object.__setattr__(self, name, kept)
        if self.thumbnail is not None and len(self.thumbnail) > MAX_THUMBNAIL:
            object.__setattr__(self, "thumbnail", None)

    def document(self) -> dict[str, Any]:
        """The record as a JSON object, without the thumbnail; a number that is not finite becomes None."""
        values = {name: getattr(self, name) for name in COLUMNS}
        for name in ("scores", "thresholds"):
            values[name] = {score: value if math.isfinite(value) else None for score, value in values[name].items()}
        return values


@dataclass(frozen=True)
class RecordFilter:
    """The conditions of a search; a record must meet all those that are given.

    Attributes:
        since: Earliest time, inclusive: an RFC 3339 time, in UTC unless it names a time zone, or an age such as 90s,
            15m, 1h, 2d or 1w. Stored as an RFC 3339 time.
        until: Latest time, exclusive, in the same forms.
        model: Name of the model.
        decision: The decision.
        predicted: Name of the class that the model predicted.
        decided_by: Name of the score that decided.
        trigger: Id of the trigger that the image matches.
        request_id: Id of the request.
        p_value: Largest p-value; records without one are left out.

    Raises:
        UsageError: A time is neither an RFC 3339 time nor an age.
    """

    since: str | None = None
    until: str | None = None
    model: str | None = None
    decision: str | None = None
    predicted: str | None = None
    decided_by: str | None = None
    trigger: str | None = None
    request_id: str | None = None
    p_value: float | None = None

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, _moment(text))
        for name in ("model", "decision", "predicted", "decided_by", "trigger", "request_id"):
            # Records contain cleaned texts, so that is what they are compared with.
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, clean(text))


def _moment(text: str) -> str:
    try:
        if ago := _AGO.fullmatch(text):
            return rfc3339(datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])}))
        return _normalised(text)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{clean(text)!r} is not a time; give one such as 2026-05-09T12:30:00Z, or an age such as 15m, 1h or 2d"
        ) from error


def thumbnail(image: "Image.Image", side: int = 128) -> bytes:
    """A small JPEG file of an image, for a record.

    Args:
        image: An image of any size; it is not changed, and never enlarged.
        side: Longest side, in pixels.
    """
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    # Colours at full resolution: a trigger is often a few pixels of one colour.
    small.save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()
