"""Watch a stream of p-values for what no single request shows: slow attacks, bursts and drift."""

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from guard._documents import read_object, validated
from guard._files import replace_file
from guard.errors import StateError

Kind = Literal["attack", "drift"]

_LEVELS: dict[Kind, tuple[float, ...]] = {
    "attack": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05),
    "drift": (0.1, 0.25, 0.5),
}
"""Levels of the p-values that are watched: an attack pushes its own requests into the tail, drift moves the body of the
distribution."""
_STAKES: dict[Kind, tuple[float, ...]] = {
    "attack": (0.002, 0.005, 0.0125, 0.03, 0.08, 0.2, 0.5),
    "drift": (0.03, 0.08, 0.2, 0.5),
}
"""Stakes of the bets. Each is best where this share of the stream changed; between steps of 2.5 little is lost."""
_TRIGGERED = 0.05
"""p-value of a match with a trigger up to which an image does not count as an event for drift."""
_QUIET_FACTOR, _QUIET_IMAGES = 4, 1000
_MAX_BYTES = 64 * 2**20
_FORMAT = 1
_SLACK = 1 + 1e-6
"""Tolerance for rounding when stored sums are compared."""


@dataclass(frozen=True)
class WatchedScore:
    """One stream of p-values that is watched.

    Attributes:
        name: Name of the stream: that of the score or the class whose p-values it consists of.
        kind: `attack` for the match with one reconstructed trigger, `drift` for a density score.
        size: Number of clean scores that its p-values are computed from; at least 19 for an attack and 1 for drift.
            To find a small change, thousands are needed.
    """

    name: str
    kind: Kind
    size: int


@dataclass(frozen=True)
class Alarm:
    """A stream has more small p-values than clean images explain.

    Attributes:
        stream: Name of the stream.
        kind: Kind of the stream: `attack` or `drift`.
        observed: Number of images in the stream when the alarm was raised.
        after: Number of images that came since the change began, as estimated at `level`; at least 1.
        level: Level of the p-values at which the change is clearest.
        rate: Share of the images since the change with a p-value of at most `level`.
        bound: The largest such share that clean images explain, including the error of the calibration.
        during_drift: For an attack alarm, whether a drift alarm is active as well, which may then be the cause. Drift
            moves the match with a trigger too, and the attack alarm may come first.
    """

    stream: str
    kind: Kind
    observed: int
    after: int
    level: float
    rate: float
    bound: float
    during_drift: bool


class Monitor:
    """Raises an alarm when the p-values of a stream become too small too often.

    The valid question is not whether p-values are uniform: given n calibration scores, the rate of p ≤ τ among clean
    images is a draw from Beta(l, n + 1 − l), l = ⌊τ(n + 1)⌋ (Vovk, "Conditional validity of inductive conformal
    predictors", ACML 2012), and a long stream finds that draw. So the null of a level is that the rate is at most r⁺,
    a quantile which that draw exceeds with probability `delta` over all levels and streams. Whether an image has
    p ≤ τ is a coin x, and betting a stake ε of the capital on it at the odds 1 / r⁺ multiplies the capital by
    L = 1 − ε + ε·x / r⁺, which is at most 1 on average for every rate up to r⁺ (for rate r⁺ + ε(1 − r⁺) it is the
    likelihood ratio). A gambler starts at every image; their capitals sum to M ← L·(M + 1), the e-detector of Shin,
    Ramdas and Rinaldo (New England Journal of Statistics in Data Science 2, 2024) in Shiryaev–Roberts form, here
    averaged over a grid of levels and stakes. An alarm is raised where it reaches `run_length` divided by the
    stream's share of the false alarms, and then starts again from 0. Half of the false alarms go to each kind, evenly
    over its streams. However often one looks, clean images raise at most one alarm in `run_length` images on average.

    This guarantee needs the probability of an event to be at most r⁺ whatever came before. A client that sends one
    unusual clean image a thousand times, or the frames of a film, breaks it. A change that stays below r⁺ is never
    found, and r⁺ is as far from τ as the calibration is small: with 2,000 scores it is 0.006 for τ = 0.001.

    To tell an attack from drift, an image whose attack p-value is at most 0.05 for any trigger counts in the drift
    streams as observed, but not as an event: a burst of triggered requests is then not drift, and the rate of clean
    images can only fall. Drift that makes all images match a trigger is reported as an attack. Drift towards larger
    p-values, that is, towards images more ordinary than those of the calibration, is not detected.

    An alarm stays active until its stream has seen four times as many images as came between change and alarm, and at
    least 1,000, without reaching the limit again. An active alarm is not raised again.

    A monitor must be used by one thread at a time.

    Args:
        streams: The streams to watch: at least one, with different names.
        run_length: Smallest mean number of images between two false alarms of the whole monitor.
        delta: Probability, over the draw of the calibration images, that the run length is shorter.

    Raises:
        ValueError: An argument is out of range, a name occurs twice, or a calibration is too small for every level.
    """

    def __init__(self, streams: Sequence[WatchedScore], *, run_length: float = 1e7, delta: float = 1e-3) -> None:
        if not streams or len({stream.name for stream in streams}) < len(streams):
            raise ValueError("a monitor needs at least one stream, and a name for each")
        if not 1 < run_length < 1e12:
            raise ValueError(f"a run length lies between 1 and 1e12 images, it is {run_length:g}")
        if not 0 < delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, not be {delta:g}")
        self._run_length, self._delta = float(run_length), float(delta)
        kinds = [stream.kind for stream in streams]
        ranks = {stream.name: _ranks(stream) for stream in streams}
        share = delta / sum(map(len, ranks.values()))
        self._detectors = {
            stream.name: _Detector(
                stream, ranks[stream.name], share, run_length * len(set(kinds)) * kinds.count(stream.kind)
            )
            for stream in streams
        }

    @property
    def active(self) -> tuple[Alarm, ...]:
        """The active alarms, in the order of the streams."""
        up = [detector for detector in self._detectors.values() if detector.alarm]
        drift = any(detector.stream.kind == "drift" for detector in up)
        return tuple(detector.describe(during_drift=drift) for detector in up)

    def observe(self, p_values: Mapping[str, float | None]) -> tuple[Alarm, ...]:
        """Process the p-values of one image.

        Args:
            p_values: Conformal p-values by name of the stream, in [0, 1]. A stream that is None or missing does not see
                the image. Which streams see an image may depend on its predicted class, but not otherwise on its
                p-values.

        Returns:
            The alarms that this image raised.

        Raises:
            ValueError: A p-value is out of range, or its stream does not exist; the state is as before.
        """
        triggered = False
        for name, p_value in p_values.items():
            if name not in self._detectors:
                raise ValueError(f"the monitor has no stream {name!r}")
            if p_value is None:
                continue
            if not 0 <= p_value <= 1:
                raise ValueError(f"a p-value lies between 0 and 1, that of {name!r} is {p_value}")
            triggered |= p_value <= _TRIGGERED and self._detectors[name].stream.kind == "attack"
        raised = set()
        for name, p_value in p_values.items():
            if p_value is not None:
                detector = self._detectors[name]
                if detector.observe(1.0 if triggered and detector.stream.kind == "drift" else p_value):
                    raised.add(name)
        return tuple(alarm for alarm in self.active if alarm.stream in raised) if raised else ()

    def state(self) -> dict[str, Any]:
        """The state that must survive a restart: the document that `save` writes and `load` reads, of JSON's types."""
        return {
            "settings": self._settings(),
            "streams": {name: detector.state() for name, detector in self._detectors.items()},
        }

    def save(self, path: Path) -> None:
        """Write the state to a file, which is complete at every moment and which only this user can read.

        Raises:
            UsageError: The file cannot be written.
        """
        write_state(path, self.state())

    def load(self, path: Path) -> None:
        """Continue exactly as another monitor with the same streams and settings would have done from its state.

        Only names and sizes of calibrations are compared; the caller must know whether the calibration is the same.

        Raises:
            StateError: The file is missing or damaged, or was saved for other streams or settings; nothing was changed.
        """
        streams = self._read(path)
        for name, state in streams.items():
            self._detectors[name].restore(state)

    def _read(self, path: Path) -> "dict[str, _StreamState]":
        raw = read_object(path, _MAX_BYTES, StateError)
        if raw.get("settings") != self._settings():
            raise StateError(f"{path} was saved for other streams or settings")
        streams = validated(path, _State, raw, StateError, strict=True).streams
        if streams.keys() != self._detectors.keys():
            raise StateError(f"{path} is damaged: it does not hold the streams that its settings name")
        for name, detector in self._detectors.items():
            try:
                detector.check(streams[name])
            except ValueError as error:
                raise StateError(f"{path} is damaged: streams.{name}: {error}") from error
        return streams

    def _settings(self) -> dict[str, Any]:
        streams = [detector.stream for detector in self._detectors.values()]
        return {
            "format": _FORMAT,
            "run_length": self._run_length,
            "delta": self._delta,
            "levels": {kind: list(levels) for kind, levels in _LEVELS.items()},
            "stakes": {kind: list(stakes) for kind, stakes in _STAKES.items()},
            "streams": [[stream.name, stream.kind, stream.size] for stream in streams],
        }


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `Monitor.state` returned, as `Monitor.save` does.

    Raises:
        UsageError: The file cannot be written.
    """
    replace_file(path, json.dumps(state, allow_nan=False).encode(), mode=0o600)


class _Raised(NamedTuple):
    """An active alarm: figures of when it was raised, and the image at which the limit was last reached."""

    observed: int
    after: int
    level: int
    rate: float
    reached: int


_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class _StreamState:
    """The stored state of one stream."""

    observed: Annotated[int, Field(ge=0, le=2**53)]
    sums: list[list[list[_NotNegative]]]
    alarm: _Raised | None

    def __post_init__(self) -> None:
        alarm = self.alarm
        if alarm and not (
            1 <= alarm.after <= self.observed
            and 1 <= alarm.observed <= alarm.reached <= self.observed
            and 0 <= alarm.rate <= _SLACK
        ):
            raise ValueError("the figures of its alarm contradict each other")


@dataclass(frozen=True)
class _State:
    """The document of a monitor's state, without its settings."""

    streams: dict[str, _StreamState]


class _Detector:
    """The e-detector of one stream.

    `sums` has shape [3, levels, stakes]. The first plane is M, a sum over gamblers; in the second each one's capital is
    multiplied by the images, in the third by the events, since that one started. The gamblers who started where the
    change began hold nearly all of the capital, so that plane 2 / plane 1 estimates how long ago that was.
    """

    def __init__(self, stream: WatchedScore, ranks: Sequence[int], delta: float, limit: float) -> None:
        self.stream = stream
        self.levels = [rank / (stream.size + 1) for rank in ranks]
        # p-values are multiples of 1 / (size + 1); the tolerance keeps their rounding on the right side.
        self._cuts = [level * (1 + 1e-6) for level in self.levels]
        self.bounds = [upper_rate(stream.size, rank, delta) for rank in ranks]
        stakes = np.array(_STAKES[stream.kind])
        event = 1 - stakes + stakes / np.array(self.bounds)[:, None]
        # Row i is for a p-value above the first i levels, which is an event at the others.
        happened = np.arange(len(ranks)) >= np.arange(len(ranks) + 1)[:, None]
        self._factors = np.where(happened[:, :, None], event, 1 - stakes)
        self._limit = limit * event.size
        self.observed = 0
        self.alarm: _Raised | None = None
        self._sums = np.zeros((3, *event.shape))

    def observe(self, p_value: float) -> bool:
        """Whether this image raises an alarm."""
        row = bisect_left(self._cuts, p_value)
        sums = self._sums
        capital = sums[0]
        capital += 1
        sums *= self._factors[row]
        sums[1] += capital
        sums[2, row:] += capital[row:]
        self.observed += 1
        alarm = self.alarm
        if float(capital.sum()) < self._limit:
            if alarm and self.observed - alarm.reached >= max(_QUIET_FACTOR * alarm.after, _QUIET_IMAGES):
                self.alarm = None
            return False
        capitals, images, events = sums.sum(axis=2)
        level = int(capitals.argmax())
        sums[:] = 0
        if alarm:
            self.alarm = _Raised(alarm.observed, alarm.after, alarm.level, alarm.rate, self.observed)
            return False
        after = max(1, round(float(images[level] / capitals[level])))
        self.alarm = _Raised(self.observed, after, level, float(events[level] / images[level]), self.observed)
        return True

    def describe(self, *, during_drift: bool) -> Alarm:
        """The active alarm, as a public record."""
        alarm = self.alarm
        if not alarm:
            raise RuntimeError("no alarm is active")
        return Alarm(
            self.stream.name,
            self.stream.kind,
            alarm.observed,
            alarm.after,
            self.levels[alarm.level],
            alarm.rate,
            self.bounds[alarm.level],
            self.stream.kind == "attack" and during_drift,
        )

    def state(self) -> dict[str, Any]:
        return {
            "observed": self.observed,
            "sums": self._sums.tolist(),
            "alarm": None if self.alarm is None else list(self.alarm),
        }

    def check(self, state: _StreamState) -> None:
        """Make sure that a state can belong to this stream.

        Raises:
            ValueError: The state cannot belong to this stream.
        """
        planes, levels, stakes = self._sums.shape
        if [[len(row) for row in plane] for plane in state.sums] != [[stakes] * levels] * planes:
            raise ValueError(f"its sums do not have the shape {planes} × {levels} × {stakes}")
        capital, images, events = np.array(state.sums)
        if (
            capital.sum() >= self._limit
            or (images > state.observed * capital * _SLACK).any()
            or (events > images * _SLACK).any()
        ):
            raise ValueError("its sums contradict each other")
        if state.alarm and not 0 <= state.alarm.level < len(self.levels):
            raise ValueError("its alarm is of a level that the stream does not have")

    def restore(self, state: _StreamState) -> None:
        self.observed, self.alarm = state.observed, state.alarm
        self._sums[:] = state.sums


def _ranks(stream: WatchedScore) -> list[int]:
    """The levels that the calibration supports, in multiples of 1 / (size + 1)."""
    if stream.kind not in _LEVELS:
        raise ValueError(f"a stream is of the kind attack or drift, {stream.name!r} is of {stream.kind!r}")
    ranks = sorted({math.floor(level * (stream.size + 1) + 1e-9) for level in _LEVELS[stream.kind]} - {0})
    if not ranks or stream.size < 1:
        least = math.ceil(1 / max(_LEVELS[stream.kind]) - 1e-9) - 1
        raise ValueError(f"the stream {stream.name!r} needs at least {least} calibration scores, it has {stream.size}")
    return ranks


def upper_rate(size: int, rank: int, delta: float) -> float:
    """The (1 − delta) quantile of Beta(rank, size + 1 − rank), 1 ≤ rank ≤ size.

    P(Beta > r) is P(Binomial(size, r) ≤ rank − 1), a finite sum. Its logarithm is concave and falls in r, so that every
    step of Newton's method ends at or beyond the root: it closes in from the side on which the bound is too large.
    """
    others = size - rank + 1
    j = np.arange(rank)
    # Logarithms of C(size, rank − 1 − j) / C(size, rank − 1).
    ratios = np.concatenate(([0.0], np.cumsum(np.log((rank - j[1:]) / (others + j[1:])))))
    last = math.lgamma(size + 1) - math.lgamma(rank) - math.lgamma(others + 1)
    rate = rank / (size + 1)
    for _ in range(200):
        total = float(np.exp(ratios + j * math.log((1 - rate) / rate)).sum())
        tail = last + (rank - 1) * math.log(rate) + others * math.log1p(-rate) + math.log(total)
        hazard = others / ((1 - rate) * total)
        step = min((tail - math.log(delta)) / hazard, (1 - rate) / 2)
        rate += step
        if abs(step) <= 1e-13 * rate:
            break
    return rate
