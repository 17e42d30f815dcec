"""Whether the clock of this machine can be believed, before anything is deleted for its age."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

log = logging.getLogger(__name__)

TRUST_SECONDS = 6 * 3600.0
"""How long a clock must run evenly before it is believed again."""
_TOLERANCE = 300.0
"""Seconds by which the clock may be set without being doubted."""
_GAP = timedelta(days=7)
"""The longest pause between records for which the clock is believed at the start."""

_CONSEQUENCE = f"no record is deleted for its age until it has run evenly for {TRUST_SECONDS / 3600:g} hours"


def _now() -> float:
    return time.time()


def _uptime() -> float:
    """Seconds that nobody can set, and that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """Doubts the time of day after it jumped, in either direction, until it has run evenly for some hours.

    It is also doubted from the start if the newest record from before these hours lies days before them: either nothing
    was recorded for long, or the clock is wrong, and waiting does no harm. Records of the last hours prove nothing,
    since they may have been written by the same wrong clock.

    Args:
        newest: The time of the newest record that is older than a given time; None if there is none, so that there is
            nothing to lose.
        now: The time of day, in seconds.
        uptime: Seconds of a clock that cannot be set.
    """

    def __init__(
        self,
        newest: Callable[[datetime], datetime | None],
        now: Callable[[], float] | None = None,
        uptime: Callable[[], float] | None = None,
    ) -> None:
        now, uptime = now or _now, uptime or _uptime
        self._now, self._uptime = now, uptime
        self._offset = now() - uptime()
        before = datetime.fromtimestamp(now(), UTC) - timedelta(seconds=TRUST_SECONDS)
        last = newest(before)
        near = last is None or before - last <= _GAP
        self._doubted_at = uptime() - TRUST_SECONDS if near else uptime()
        if not near:
            log.warning("the evidence log has a pause after %s, or the clock is wrong: %s", last, _CONSEQUENCE)

    def is_believed(self) -> bool:
        """Whether ages can be computed from the time of day."""
        offset = self._now() - self._uptime()
        if abs(offset - self._offset) > _TOLERANCE:
            log.warning("the clock was set by %.0f s: %s", offset - self._offset, _CONSEQUENCE)
            self._doubted_at = self._uptime()
        self._offset = offset
        return self._uptime() - self._doubted_at >= TRUST_SECONDS
