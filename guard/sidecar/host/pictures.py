"""Pictures of reconstructed triggers, for the page of a sidecar. numpy and Pillow only."""

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image

from guard._types import Floats
from guard.profiles import Profile
from guard.profiles.document import TriggerRecord
from guard.triggers.numpy_apply import applied

log = logging.getLogger(__name__)

_SIDE, _GAP, _AMPLIFICATION = 96, 4, 4


def drawn(profile: Profile, record: TriggerRecord) -> bytes | None:
    """A PNG file: a test card, the card with the trigger, and four times the difference around mid-grey, side by side.

    Args:
        profile: The profile of the trigger.
        record: The trigger.

    Returns:
        The file; None if the trigger is of a family that cannot be drawn here, or cannot be used.
    """
    card = _card()
    try:
        stamped = applied(record.family, profile.triggers[record.id], card)
    except (KeyError, ValueError) as error:
        log.warning("the trigger %s cannot be drawn: %s", record.id, error)
        return None
    if stamped is None:
        return None
    change = np.clip(0.5 + _AMPLIFICATION * (stamped - card), 0, 1)
    gap = np.ones((3, _SIDE, _GAP), np.float32)
    strip = np.concatenate((card, gap, stamped, gap, change), axis=2)
    buffer = io.BytesIO()
    Image.fromarray((strip * 255).round().astype(np.uint8).transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _card() -> Floats:
    """Gradients and stripes, which every family of triggers changes visibly: shape [3, S, S]."""
    across = np.broadcast_to(np.linspace(0.1, 0.9, _SIDE, dtype=np.float32), (_SIDE, _SIDE))
    stripes = np.broadcast_to((np.arange(_SIDE) // (_SIDE // 8) % 2 * 0.6 + 0.2).astype(np.float32), (_SIDE, _SIDE))
    return np.stack((across, across.T, stripes))
