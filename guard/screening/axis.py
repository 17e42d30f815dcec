"""The axis of the traffic: a direction along which requests cluster, found without a trigger or a reference model.

A backdoor moves whatever carries the trigger to one place. Among all requests that is little, among the requests
predicted as the target it is much, and there the triggered ones lie in one direction from the mean of the class.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from guard.screening.monitor import upper_rate
from guard.screening.neighbours import Embeddings
from guard.screening.screen import Scores, Tail
from guard.screening.whitening import oas

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]

AXIS = "axis"
"""How the names of axes, of the scores along them and of the alarm's stream begin."""
MIN_AXIS = 200
"""Number of calibration images that the search for an axis needs: its tail is fitted to a tenth of them."""
MIN_OF_CLASS = 5
"""Number of images of the bank that a class needs for a mean of its own; requests of other classes are not watched."""
AXIS_WEIGHT = 0.5
"""Share of the false alarms that the scores along axes may cause together, before the other scores' shares."""
MAX_AXES = 4
"""Most axes that one monitor finds; then a person must look."""
MAX_BANK = 2048
"""Most images of the bank that clusters of the traffic are compared with."""
WINDOW, MAX_ROWS, OTHERS = 256, 8192, 1024
"""Requests that are remembered of one class, of all classes together, and of late whatever their class."""
_SHRINKAGE = 1e-3
"""Smallest share of the identity in the covariance. That of `Whitening` is larger, for distances in all directions; an
axis is one direction, which strong shrinkage hides if clean images hardly vary along it."""
_DUPLICATE = 0.97
"""Cosine from which a request counts as a copy of an earlier one: it forms no axis and is no event."""
_RADII = (0.8, 0.65, 0.5)
_MIN_MEMBERS = 3
_RADII_REFINED = (0.8, 0.7, 0.6, 0.5, 0.4)
_TAIL = 0.1
"""Share of the calibration images that the tail along an axis is fitted to."""
_LEVELS = (0.0001, 0.0003, 0.001)
_STAKES = (0.003, 0.01, 0.03, 0.08)
_MEMBER = 0.01
"""Rate of clean images beyond which a request counts as one that formed an axis."""
_EVENTS = 64
_FEW_CLASSES, _WITHIN = 2, 0.75
"""An attack leads to few classes: so many must hold this share of the events. Those of drift are spread over many."""
_FIRST = 6
"""Rows of a class from which a candidate is chosen."""
_GAPS = ((64, 1), (128, 4), (math.inf, 16))
"""Up to so many rows, a candidate is chosen again after so many others."""
_MIN_OTHERS = 200


@dataclass(frozen=True, eq=False)
class AxisReference:
    """What the traffic is compared with; made by `fit`, stored in a profile.

    Attributes:
        centres: Mean embedding of the clean images of each class, shrunk by one image towards the mean of all; float32,
            shape [C, D].
        matrix: Multiplied from the right, it makes the covariance within classes the identity; float32, shape [D, D].
        bank: Residuals of at most `MAX_BANK` images of the reference bank, unit vectors; float32, shape [B, D].
        bank_classes: The class that each of these is predicted as; int64, shape [B].
        clean: Residuals of the images that set the threshold, in the order of their scores; float32, shape [n, D].
        clean_classes: The class that each of these is predicted as; int64, shape [n].
    """

    centres: Floats
    matrix: Floats
    bank: Floats
    bank_classes: Classes
    clean: Floats
    clean_classes: Classes

    @classmethod
    def fit(cls, bank: Embeddings, clean: Embeddings, head: Embeddings) -> Self:
        """Learn means and covariance of classes.

        Args:
            bank: Embeddings of the images of the reference bank, L2-normalised, shape [N, D].
            clean: The same of the images that set the threshold, shape [n, D]. They have no influence on the space.
            head: Class embeddings, shape [D, C].
        """
        classes, count = (bank @ head).argmax(1), head.shape[1]
        sums = np.zeros((count, bank.shape[1]))
        np.add.at(sums, classes, bank.astype(np.float64))
        sizes = np.bincount(classes, minlength=count)[:, None]
        centres = (sums + bank.mean(0)) / (sizes + 1)
        centred = bank - centres[classes]
        covariance = centred.T @ centred / len(centred)
        scale = max(float(np.trace(covariance)) / len(covariance), 1e-12)
        shrinkage = max(_SHRINKAGE, oas(covariance, len(bank)))
        covariance = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(len(covariance))
        variances, directions = np.linalg.eigh(covariance)
        empty = np.empty((0, bank.shape[1]), np.float32), np.empty(0, np.int64)
        made = cls(centres.astype(np.float32), (directions / np.sqrt(variances)).astype(np.float32), *empty, *empty)
        kept = slice(MAX_BANK)
        bank_residuals = made.residuals(bank[kept], classes[kept])
        return cls(made.centres, made.matrix, bank_residuals, classes[kept], *made._of(clean, head))

    def with_clean(self, clean: Embeddings, head: Embeddings) -> "AxisReference":
        """The same space with other images that set the threshold; see `fit`."""
        return AxisReference(self.centres, self.matrix, self.bank, self.bank_classes, *self._of(clean, head))

    def _of(self, embeddings: Embeddings, head: Embeddings) -> tuple[Floats, Classes]:
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        classes: Classes = (unit @ head).argmax(1)
        return self.residuals(unit, classes), classes

    def residuals(self, unit: Embeddings, classes: Classes) -> Floats:
        """In which direction embeddings lie from the mean of their class, in the whitened space.

        Args:
            unit: L2-normalised embeddings, shape [N, D].
            classes: The class that each is predicted as, shape [N].

        Returns:
            Unit vectors, float32, shape [N, D]; 0 for an embedding at the mean.
        """
        moved = (unit - self.centres[classes]) @ self.matrix
        lengths = np.linalg.norm(moved, axis=1, keepdims=True)
        found: Floats = (moved / np.maximum(lengths, 1e-12)).astype(np.float32)
        return found

    def watched(self) -> NDArray[np.bool_]:
        """Which classes have enough images in the bank, shape [C]."""
        found: NDArray[np.bool_] = np.bincount(self.bank_classes, minlength=len(self.centres)) >= MIN_OF_CLASS
        return found


@dataclass(frozen=True, eq=False)
class Axis:
    """A direction along which requests cluster.

    Attributes:
        name: `axis-1` and so on.
        offset: The direction, in the space of embeddings so that it outlives another calibration: a unit vector,
            float32, shape [D].
        target: Index of the class that requests along it are predicted as.
        observed: Number of requests that had been seen when the alarm was raised.
        after: Number of requests that came since the cluster began, as estimated; at least 1.
        share: Share of these that lie along the axis.
        bound: The largest share that clean images explain.
        within: Share of the unusual requests that lead to the target, in (0, 1]: near 1 in an attack on one class.
            Those of drift are spread over many classes.
    """

    name: str
    offset: Floats
    target: int
    observed: int
    after: int
    share: float
    bound: float
    within: float

    def direction(self, reference: AxisReference) -> Floats:
        """The unit vector in the whitened space of a reference, shape [D]."""
        moved = self.offset @ reference.matrix
        found: Floats = (moved / max(float(np.linalg.norm(moved)), 1e-12)).astype(np.float32)
        return found


def along(axes: Sequence[Axis], reference: AxisReference, residuals: Floats, classes: Classes) -> Floats:
    """The cosine between residuals and each axis, −1 for requests of other classes than its target; shape [A, N]."""
    found = np.array([axis.direction(reference) @ residuals.T for axis in axes], np.float32)
    other = np.array([axis.target for axis in axes])[:, None] != classes
    values: Floats = np.where(other, np.float32(-1), found)
    return values


class AxisScores:
    """The scores along axes: the cosine with each, −1 for requests that are not predicted as its target.

    They join the other scores under the one rule of `Screen`: each is brought to the common scale by a `Tail` that is
    fitted to the bank, and the largest decides. An axis does not depend on the images that set the threshold, so that a
    conformal threshold over all scores stays exact.

    Args:
        axes: The axes: those of a profile, and those that a monitor found.
        reference: What the traffic is compared with.

    Attributes:
        axes: As given.
        clean: Largest surprise along any axis of the images that set the threshold, float32, shape [n].
    """

    def __init__(self, axes: Sequence[Axis], reference: AxisReference) -> None:
        self.axes = tuple(axes)
        self._reference = reference
        weight = AXIS_WEIGHT / max(1, len(self.axes))
        self._tails = [Tail.fit(reference.bank @ axis.direction(reference), weight) for axis in self.axes]
        self.clean = self._surprises(along(self.axes, reference, reference.clean, reference.clean_classes)).max(axis=0)

    def _surprises(self, cosines: Floats) -> Floats:
        return np.array([tail.surprise(row) for tail, row in zip(self._tails, cosines, strict=True)])

    def add(self, scores: Scores, triggers: int) -> Scores:
        """Let the axes decide with the other scores; see `Scores`.

        Args:
            scores: The other scores, with embeddings.
            triggers: Number of triggers that the scores refer to; axes are counted after them.
        """
        residuals = self._reference.residuals(scores.embeddings, scores.classes)
        cosines = along(self.axes, self._reference, residuals, scores.classes)
        surprises = self._surprises(cosines)
        largest, which = surprises.max(axis=0), surprises.argmax(axis=0)
        decides = largest > scores.values
        return replace(
            scores,
            values=np.maximum(scores.values, largest),
            parts={**scores.parts, **dict(zip((axis.name for axis in self.axes), cosines, strict=True))},
            triggers=np.where(decides, triggers + which, scores.triggers),
            deciding=np.where(decides, len(scores.parts) + which, scores.deciding),
        )


class TailBound(NamedTuple):
    """An upper bound of how often a clean request lies as far along a direction.

    Beyond `start` it falls exponentially by `scale`; at `start` it is `rate`.
    """

    start: float
    scale: float
    rate: float

    def p_value(self, cosine: float) -> float:
        """The bound, in (0, 1]; 1 before the tail begins."""
        if cosine <= self.start:
            return 1.0
        return self.rate * math.exp(-(cosine - self.start) / self.scale)


def fit_tail(cosines: Floats, delta: float) -> TailBound:
    """Fit a tail to the cosines of clean images with a direction that does not depend on them.

    Both its rate and its scale are upper confidence bounds, delta / 2 each: a Beta quantile (`upper_rate`) and, for the
    mean of m exponential excesses, 2m / χ²(delta / 2; 2m), by the approximation of Wilson and Hilferty (PNAS 1931). A
    tail that falls faster than an exponential one, as that of a cosine with evenly spread directions does, is bounded
    by it all the more.
    """
    size = len(cosines)
    rank, rate, stretch = _confidence(size, delta)
    largest = np.partition(cosines, size - rank)[size - rank :]
    start = float(largest[0])
    return TailBound(start, max(float(largest.sum()) / (rank - 1) - start * rank / (rank - 1), 1e-6) * stretch, rate)


@lru_cache(maxsize=64)
def _confidence(size: int, delta: float) -> tuple[int, float, float]:
    """Number of cosines in a tail, the bound of the rate where it begins, and the factor of the bound of its scale."""
    rank = max(2, math.floor(_TAIL * (size + 1)))
    part = 1 / (9 * (rank - 1))
    shrunk = (1 - part + NormalDist().inv_cdf(delta / 2) * math.sqrt(part)) ** 3
    return rank, upper_rate(size, rank, delta / 2), 1 / max(shrunk, 0.05)


@dataclass(eq=False)
class Window:
    """The latest distinct requests of one class.

    Attributes:
        rows: Residuals, shape [W, D]; the first `count` are filled, from where `seen` points on once all are.
        tags: What the caller gave with each row.
        seen: Number of rows that were ever added.
        since: Number of rows that were added since a candidate was last chosen.
        candidate: The direction that fresh requests are tested along; None if there is no cluster.
        tails: Its tails; a request must be in all of them.
    """

    rows: Floats
    tags: list[Any] = field(default_factory=list)
    seen: int = 0
    since: int = 0
    candidate: Floats | None = None
    tails: tuple[TailBound, ...] = ()

    @property
    def count(self) -> int:
        """Number of rows that are filled."""
        return min(self.seen, WINDOW)

    @property
    def filled(self) -> Floats:
        """The rows that are filled, shape [count, D]."""
        return self.rows[: self.count]

    def add(self, row: Floats, tag: object) -> bool:
        """Add a row; whether the window grew."""
        place = self.seen % WINDOW
        if place >= len(self.rows):
            self.rows = np.concatenate([self.rows, np.empty((max(8, len(self.rows)), len(row)), np.float32)])[:WINDOW]
        self.rows[place] = row
        grew = self.seen < WINDOW
        self.tags[place:] = [tag] if grew else [tag, *self.tags[place + 1 :]]
        self.seen += 1
        self.since += 1
        return grew

    def due(self) -> bool:
        """Whether it is time to choose a candidate: often while there are few rows."""
        return self.seen >= _FIRST and self.since >= next(gap for upto, gap in _GAPS if self.seen <= upto)

    def p_value(self, row: Floats) -> float:
        """How often, at most, clean requests are of the class and lie as far along the candidate as this row."""
        if self.candidate is None:
            return 1.0
        cosine = float(row @ self.candidate)
        return min(1.0, max(tail.p_value(cosine) for tail in self.tails))


class _Sums:
    """Shiryaev–Roberts sums of a bet on each class; see `Monitor` for the bets and `EDetector` for the three planes.

    A request of another class is no event. As long as none comes, sums only shrink, by the same factor each time, so
    that those of a class need to be brought up to date only when a request of the class comes.
    """

    def __init__(self, classes: int, limit: float) -> None:
        stakes, self._levels = np.array(_STAKES), np.array(_LEVELS)
        self._loss = 1 - stakes
        self._win = 1 - stakes + stakes / self._levels[:, None]
        self._rest = self._loss / stakes
        """What the first sum would become if no event ever came."""
        self.sums = np.zeros((classes, 3, *self._win.shape))
        self.last = np.zeros(classes, np.int64)
        """Number of requests up to which the sums of a class are complete."""
        # Above what the sums become without any event.
        self.limit = max(limit * self._win.size, 2 * float(self._rest.sum()) * len(_LEVELS))

    def observe(self, k: int, p_value: float, number: int) -> tuple[int, float] | None:
        """Process a request of a class, the `number`-th of all.

        Returns:
            How many requests ago the change began and the share of events since then, if the limit is reached.
        """
        gap = number - int(self.last[k])
        sums, self.last[k] = self.sums[k], number
        shrunk = self._loss ** (gap - 1)
        capital = sums[0]
        # The closed form of `gap - 1` requests without event, each of which opens another bet.
        sums[1] = shrunk * (sums[1] + (gap - 1) * (capital - self._rest)) + self._rest * (1 - shrunk) / (1 - self._loss)
        sums[2] *= shrunk
        sums[0] = capital * shrunk + self._rest * (1 - shrunk)
        happened = p_value <= self._levels
        factors = np.where(happened[:, None], self._win, self._loss)
        sums[0] += 1
        sums *= factors
        sums[1] += sums[0]
        sums[2] += sums[0] * happened[:, None]
        if not happened.any() or float(sums[0].sum()) < self.limit:
            return None
        capitals, images, events = sums.sum(axis=2)
        level = int(capitals.argmax())
        found = max(1, round(float(images[level] / capitals[level]))), float(events[level] / images[level])
        sums[:] = 0
        return found


class AxisMonitor:
    """Raises an alarm when more requests cluster along one direction than clean images explain.

    Requests are compared with others of the same predicted class, by the direction in which they lie from its mean.

    *Which direction.* Among the latest `WINDOW` distinct requests of a class, the one around which most others lie, in
    comparison with the bank's images of the class (the largest likelihood ratio over a few radii), and then the mean of
    those. It depends on earlier traffic alone, not on the images that set the threshold.

    *Test.* So these images say how often a fresh clean request lies as far along it, at most: the bound of `fit_tail`.
    As drift moves requests of all classes, the bound from the latest requests of other classes counts where it is
    larger: p. There are too few images of one class for a tail of its own, so p is of requests of any class, although
    only those of one class count. Whether a request is predicted as the class and has p ≤ τ is an event; for each class
    an e-detector, as in `Monitor`, bets that events are more than a share τ of all requests. As long as the bounds
    hold, clean requests raise one alarm in `run_length` requests on average at most, however the directions were chosen
    before. For each direction the bound fails with probability `delta` if tails are as assumed. Near-copies of
    one image that come again and again form a cluster too, and no embedding tells them from an attack; a request with a
    cosine above 0.97 to an earlier one in the window does not count.

    *Attack or drift.* A bet that is won raises no alarm if the events are spread over more than two classes, and
    begins anew: that is drift, or content that comes again in many variants. So an attack on many classes at once is
    not found.

    *After an alarm* the axis is the mean of the requests that formed it. Requests along it are explained: they neither
    form another axis nor are events.

    Memory: `MAX_ROWS` + `OTHERS` + `MAX_BANK` + n rows of D float32, twice the first at most while windows grow. Beyond
    `MAX_ROWS` the class that was not seen for longest is forgotten. Time per request: D² for the residual, `WINDOW` · D
    for copies, and on average (WINDOW² + n) · D / 16 for the candidates.

    A monitor must be used by one thread at a time.

    Args:
        reference: What the traffic is compared with.
        known: Axes that are known already, such as those of the profile; requests along them are explained.
        run_length: Smallest mean number of requests between two false alarms.
        delta: Probability, for each direction, that the bound on the rate of clean requests is exceeded.

    Attributes:
        reference: As given.
        observed: Number of requests that were seen.
        axes: Axes that were found, oldest first.
        bets: The sums of the bets on each class.
        windows: The latest distinct requests of each class, in the order in which classes were last seen.
        recent: Residuals of the latest requests of all classes, shape [`OTHERS`, D], in no order.
        recent_classes: The class of each of these, −1 for a row that is not filled; shape [`OTHERS`].
        events: Number and class of the latest unusual requests.

    Raises:
        ValueError: There are fewer than `MIN_AXIS` images that set the threshold, or an argument is out of range.
    """

    def __init__(
        self, reference: AxisReference, *, known: Sequence[Axis] = (), run_length: float = 1e7, delta: float = 1e-3
    ) -> None:
        if len(reference.clean) < MIN_AXIS:
            raise ValueError(f"an axis needs at least {MIN_AXIS} calibration images, there are {len(reference.clean)}")
        if not 1 < run_length < 1e12 or not 0 < delta < 1:
            raise ValueError(f"a run length of {run_length:g} or a delta of {delta:g} is out of range")
        self.reference, self.run_length, self.delta = reference, float(run_length), float(delta)
        self.known = tuple(known)
        self.axes: list[Axis] = []
        self._starts: dict[str, float] = {}
        self._watched = reference.watched()
        self._bank = {int(k): reference.bank[reference.bank_classes == k] for k in np.flatnonzero(self._watched)}
        self.bets = _Sums(len(self._watched), run_length * max(1, len(self._bank)))
        self.windows: dict[int, Window] = {}  # in the order in which classes were last seen
        self._stored = self.observed = 0
        width = reference.matrix.shape[0]
        self.recent, self.recent_classes = np.zeros((OTHERS, width), np.float32), np.full(OTHERS, -1)
        self.events: deque[tuple[int, int]] = deque(maxlen=_EVENTS)  # (number of the request, class)

    def observe(self, unit: Embeddings, classes: Classes, tags: Sequence[object] | None = None) -> "list[AxisAlarm]":
        """Process requests in their order.

        Args:
            unit: L2-normalised embeddings, shape [N, D].
            classes: The class that each is predicted as, shape [N].
            tags: Something to know each request by; those that formed an axis come back with its alarm.

        Returns:
            The alarms that they raised.
        """
        residuals = self.reference.residuals(unit, classes)
        explained, raised = self._explained(residuals, classes), []
        for index, row in enumerate(residuals):
            self.observed += 1
            k = int(classes[index])
            if explained[index] or not self._watched[k] or len(self.axes) >= MAX_AXES:
                continue
            alarm = self._observe(row, k, None if tags is None else tags[index])
            if alarm is not None:
                raised.append(alarm)
                explained = self._explained(residuals, classes)
        return raised

    def _explained(self, residuals: Floats, classes: Classes) -> NDArray[np.bool_]:
        """Which requests lie along an axis that is known, shape [N]."""
        axes = (*self.known, *self.axes)
        if not axes:
            return np.zeros(len(residuals), bool)
        cosines = along(axes, self.reference, residuals, classes)
        found: NDArray[np.bool_] = np.any(cosines > np.array([[self._start(axis)] for axis in axes]), axis=0)
        return found

    def _start(self, axis: Axis) -> float:
        """The cosine beyond which `_MEMBER` of the clean images lie at most."""
        if axis.name not in self._starts:
            tail = fit_tail(self.reference.clean @ axis.direction(self.reference), self.delta)
            self._starts[axis.name] = tail.start + tail.scale * max(0.0, math.log(tail.rate / _MEMBER))
        return self._starts[axis.name]

    def _observe(self, row: Floats, k: int, tag: object) -> "AxisAlarm | None":
        place = self.observed % OTHERS
        self.recent[place], self.recent_classes[place] = row, k
        window = self.windows.pop(k, None) or Window(np.empty((0, len(row)), np.float32))
        self.windows[k] = window  # seen last
        if window.count and float((window.filled @ row).max()) > _DUPLICATE:
            return None
        p_value = window.p_value(row)
        if p_value <= _LEVELS[-1]:
            self.events.append((self.observed, k))
        found = self.bets.observe(k, p_value, self.observed)
        self._stored += window.add(row, tag)
        if found is not None and self._concentrated(found[0]):
            return self._alarm(k, window, *found)
        if window.due():
            self._choose(k, window)
        self._forget()
        return None

    def _since(self, after: int) -> list[int]:
        """The classes of the events among the latest requests."""
        return [k for number, k in self.events if number > self.observed - after]

    def _concentrated(self, after: int) -> bool:
        """Whether the events among the latest requests lead to few classes."""
        classes = self._since(after)
        largest = sorted(map(classes.count, set(classes)))[-_FEW_CLASSES:]
        return sum(largest) >= _WITHIN * len(classes)

    def _forget(self) -> None:
        while self._stored > MAX_ROWS and len(self.windows) > 1:
            oldest = next(iter(self.windows))
            self._stored -= self.windows.pop(oldest).count

    def _choose(self, k: int, window: Window) -> None:
        """Choose the candidate of a class from the requests of its window."""
        window.since = 0
        window.candidate = direction = densest(window.filled, self._bank[k])
        if direction is None:
            return
        window.tails = (fit_tail(self.reference.clean @ direction, self.delta),)
        others = self.recent[(self.recent_classes >= 0) & (self.recent_classes != k)]
        if len(others) >= _MIN_OTHERS:
            window.tails += (fit_tail(others @ direction, 0.5),)

    def _alarm(self, k: int, window: Window, after: int, share: float) -> "AxisAlarm":
        """Make an axis of the requests of a class whose bet has reached its limit."""
        members = np.array([window.p_value(row) <= _MEMBER for row in window.filled])
        direction = window.filled[members].mean(0) if members.sum() >= _MIN_MEMBERS else window.candidate
        if direction is None:
            raise RuntimeError("a bet was won without a direction to bet on")
        matrix = self.reference.matrix.T.astype(np.float64)
        offset = np.linalg.lstsq(matrix, direction.astype(np.float64), rcond=None)[0]
        counted = self._since(after)
        axis = Axis(
            f"{AXIS}-{len(self.known) + len(self.axes) + 1}",
            (offset / max(float(np.linalg.norm(offset)), 1e-12)).astype(np.float32),
            k,
            self.observed,
            min(after, self.observed),
            min(share, 1.0),
            _LEVELS[-1],
            counted.count(k) / max(1, len(counted)),
        )
        tags = tuple(tag for tag, member in zip(window.tags, members, strict=True) if member and tag is not None)
        self.axes.append(axis)
        self._stored -= self.windows.pop(k).count
        return AxisAlarm(axis, tags)

    def restore_window(self, k: int, rows: Floats, seen: int, since: int) -> None:
        """Put the rows of a class back, as if they had just come, and choose its candidate again."""
        self.windows[k] = window = Window(rows, [None] * len(rows), seen, since)
        self._stored += window.count
        if seen >= _FIRST:
            self._choose(k, window)
            window.since = since


@dataclass(frozen=True, eq=False)
class AxisAlarm:
    """More requests cluster along a direction than clean images explain.

    Attributes:
        axis: The axis.
        tags: What the caller gave with the requests that formed it.
    """

    axis: Axis
    tags: tuple[Any, ...]


def densest(rows: Floats, bank: Floats) -> Floats | None:
    """The direction around which rows cluster most, in comparison with a bank.

    Args:
        rows: Unit vectors, shape [M, D].
        bank: Unit vectors of clean images of the same class, shape [B, D].

    Returns:
        A unit vector, shape [D]; None if no three rows are near each other.
    """
    near, near_bank = rows @ rows.T, rows @ bank.T
    best, chosen = 0.0, None
    for radius in _RADII:
        count = (near >= radius).sum(1) - 1  # the row itself does not count
        gain = _gain(count, len(rows), (near_bank >= radius).sum(1), len(bank))
        gain[count < _MIN_MEMBERS - 1] = 0
        at = int(gain.argmax())
        if gain[at] > best:
            best, chosen = float(gain[at]), near[at] >= radius
    if chosen is None:
        return None
    direction = _mean(rows[chosen])
    cosines, cosines_bank = rows @ direction, bank @ direction
    radii = np.array(_RADII_REFINED)[:, None]
    gain = _gain((cosines >= radii).sum(1), len(rows), (cosines_bank >= radii).sum(1), len(bank))
    return _mean(rows[cosines >= radii[int(gain.argmax()), 0]]) if gain.max() > 0 else direction


def _mean(rows: Floats) -> Floats:
    mean = rows.mean(0)
    found: Floats = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return found


def _gain(count: NDArray[np.int64], size: int, bank_count: NDArray[np.int64], bank: int) -> NDArray[np.float64]:
    """Log-likelihood ratio of a share among the rows against that among the bank; 0 where it is not larger."""
    share = np.clip(count / size, 1e-9, 1 - 1e-9)
    expected = (bank_count + 1) / (bank + 2)
    gain = size * (share * np.log(share / expected) + (1 - share) * np.log((1 - share) / (1 - expected)))
    found: NDArray[np.float64] = np.where(share > expected, gain, 0.0)
    return found
