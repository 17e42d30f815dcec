"""One record as a self-contained HTML page, on which a person can judge it."""

import base64
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guard._pages import templates
from guard.errors import UsageError
from guard.evidence.explanation import DECISIONS, explained
from guard.evidence.records import Record

if TYPE_CHECKING:
    from guard.profiles import Profile

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_SIDE = 160


@dataclass(frozen=True)
class _Bar:
    """A score drawn as a bar; positions are in per cent of the length of the line."""

    name: str
    value: float
    threshold: float | None
    left: float = 0.0
    width: float = 0.0
    mark: float = 0.0


def record_page(record: Record, profile: "Profile | None" = None) -> str:
    """The HTML text of one record.

    Everything in a record is escaped, the page may load and run nothing, and a thumbnail that is neither PNG nor JPEG
    is not shown.

    Args:
        record: The record to show.
        profile: The profile of the model, to draw a picture of the trigger; this needs torch.

    Raises:
        UsageError: The profile belongs to another model.
        ModuleNotFoundError: With a profile: torch or matplotlib is not installed.
    """
    if profile is not None and profile.document.model.digest != record.model_digest:
        raise UsageError(
            "the profile is of another model than the record; give the profile of the model that was served"
        )
    return (
        templates("evidence")
        .get_template("record.html.j2")
        .render(
            record=record,
            decision=DECISIONS.get(record.decision, record.decision),
            reading=explained(record),
            bars=[_bar(name, value, record.thresholds.get(name)) for name, value in record.scores.items()],
            thumbnail=_data_uri(record.thumbnail),
            trigger=None if profile is None else _drawn(profile, record.trigger),
        )
    )


def _bar(name: str, value: float, threshold: float | None) -> _Bar:
    """A bar from zero to the value, with a mark at the threshold; without a threshold a bar would say nothing."""
    if threshold is None or not math.isfinite(value) or not math.isfinite(threshold):
        return _Bar(name, value, None)
    low, high = min(0.0, value, threshold), max(0.0, value, threshold)
    scale = 100 / (high - low) if high > low else 0.0
    start, end = sorted((0.0, value))
    return _Bar(name, value, threshold, (start - low) * scale, (end - start) * scale, (threshold - low) * scale)


def _data_uri(data: bytes | None) -> str | None:
    if data is None:
        return None
    kind = next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), None)
    return None if kind is None else f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _drawn(profile: "Profile", name: str) -> dict[str, Any] | None:
    """Pictures of a trigger on a test card; None if the profile has no such trigger."""
    record = next((item for item in profile.document.triggers if item.id == name), None)
    if record is None:
        return None
    from guard.report import examples
    from guard.report.pictures import png

    drawn = examples(profile)[name]
    pictures = {
        "where it acts": drawn.mask,
        "a test card": drawn.clean[0],
        "the card with it": drawn.stamped[0],
        "what it changes, amplified": drawn.change[0],
    }
    return {
        "family": record.family,
        "target": profile.class_name(record.target),
        "pictures": {label: png(pixels, _SIDE) for label, pixels in pictures.items()},
    }
