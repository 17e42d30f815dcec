"""Score requests by where their embeddings lie; larger is more suspicious, always."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.screening.neighbours import Embeddings, Neighbours, SearchMethod
from guard.screening.second_opinion import DIVERGENCE, OPINIONS, RESIDUAL, ReferenceAnswers, SecondOpinion
from guard.screening.whitening import Whitening

MAX_K = 16
"""Largest k: that of Huang et al. (ICLR 2025), whose reference is a batch of thousands of images."""
_FLOOR = 1e-3
"""Added to both distances of a ratio: a request that is in a bank has distance 0, and float32 resolves no less."""

DENSITY = "k-distance"
"""Name of the density score."""
MATCH = "match"
"""How the names of the scores that compare with a trigger begin."""
DENSITY_WEIGHT = 0.1
"""Share of the false alarms that the density score may cause where there are triggers to match. On the zoo `small` of
seed 0 this costs no detection, and density is the only defence against a trigger that vetting did not find."""
JOINT = "joint"
"""Name of the score for match and divergence together."""
ALONE_WEIGHT, RESIDUAL_WEIGHT, DIVERGENCE_WEIGHT = 0.1, 0.1, 0.05
"""Shares of the false alarms, with a second opinion, of the scores that need none (in the same proportion as without
one), of the residual, and of the divergence where there are triggers. The joint score has the rest; where there are no
triggers, the divergence has it."""
NEAR = 0.3
"""Share of clean images whose other scores are near enough to a threshold for a second opinion, where only those get
one."""
_TAIL = 0.9
"""Quantile of a score above which its tail begins."""


def default_k(bank: int, classes: int) -> int:
    """The neighbour to take distances to.

    The reference bank contains about bank / classes genuine images of the target class. If k is a large part of these,
    the k-th clean neighbour of a genuine image lies at the edge of its class or in another, and genuine images of the
    target look triggered. So k is a fortieth of a class's share, at least 2 and at most `MAX_K`
    (benchmarks/results/neighbour.md).

    Args:
        bank: Number of images in the reference bank.
        classes: Number of classes.
    """
    return max(2, min(MAX_K, bank // (40 * classes)))


@dataclass(frozen=True)
class Tail:
    """Brings a score to a scale that all scores share: how far it is in the tail of the scores of clean images.

    Attributes:
        start: The 90 % quantile of the score over the bank's own images, each compared with the others.
        scale: Mean excess over `start` of the scores above it; larger than 0.
        weight: Share of the false alarms that the score may cause, in (0, 1].
    """

    start: float
    scale: float
    weight: float

    @classmethod
    def fit(cls, scores: NDArray[np.floating], weight: float) -> "Tail":
        """Fit a tail to scores of clean images, shape [n]."""
        start = float(np.quantile(scores, _TAIL))
        excess = scores[scores > start] - start
        return cls(start, max(float(excess.mean()) if len(excess) else 0.0, 1e-6), weight)

    def pure(self, scores: NDArray[np.floating]) -> NDArray[np.float32]:
        """How far scores are in the tail, in units of its scale.

        If the tail is exponential, this is −log of the share of the tail that is above the score.
        """
        values: NDArray[np.float32] = ((scores - self.start) / self.scale).astype(np.float32)
        return values

    def surprise(self, scores: NDArray[np.floating]) -> NDArray[np.float32]:
        """`pure` plus the logarithm of the weight: scores of several kinds are compared by it."""
        return self.pure(scores) + np.float32(math.log(self.weight))


@dataclass(frozen=True, eq=False)
class Banks:
    """The embeddings that requests are compared with; made by `Banks.fit`, stored in a profile.

    Attributes:
        whitening: Moves embeddings into the space of the banks.
        head: Class embeddings, shape [D, C], by which the class of a request is predicted.
        reference: Embeddings of clean images, whitened, shape [N, D].
        stamped: For each reconstructed trigger the embeddings of the same images with that trigger, whitened,
            shape [N, D].
        k: The neighbour that distances are taken to.
        tails: For each score the tail of its distribution over the bank's own images.
        opinion: Compares the suspect's answers with those of a reference model; None without a second opinion.
        near: Surprise of the scores without a second opinion that `NEAR` of the bank's own images exceed: a request
            above it is near the threshold. None without a second opinion.
    """

    whitening: Whitening
    head: Embeddings
    reference: Embeddings
    stamped: Mapping[str, Embeddings]
    k: int
    tails: Mapping[str, Tail]
    opinion: SecondOpinion | None = None
    near: float | None = None

    @classmethod
    def fit(
        cls,
        clean: Embeddings,
        stamped: Mapping[str, Embeddings],
        head: Embeddings,
        *,
        k: int,
        answers: ReferenceAnswers | None = None,
        scale: float = 1.0,
    ) -> "Banks":
        """Whiten the banks, and learn how the scores of clean images are distributed.

        Args:
            clean: Embeddings of clean images, shape [N, D], L2-normalised.
            stamped: For each trigger the embeddings of the same images with that trigger, in the same order.
            head: Class embeddings, shape [D, C].
            k: The neighbour that distances are taken to; smaller than N.
            answers: What a reference model computed for the clean images; None for no second opinion.
            scale: Factor between cosine and logit of the suspect; needed for a second opinion.

        Raises:
            ValueError: Shapes do not fit, or there are no more than k images.
        """
        if any(bank.shape != clean.shape for bank in stamped.values()):
            raise ValueError("reference and stamped banks must be of the same images")
        if not 1 <= k < len(clean):
            raise ValueError(f"k = {k} needs more than {k} images, there are {len(clean)}")
        whitening = Whitening.fit(clean, predict(clean, head))
        reference = whitening(clean)
        moved = {name: whitening(bank) for name, bank in stamped.items()}
        own = np.arange(len(clean))
        far = last_of_others(Neighbours(reference), reference, k, own)
        scores = {DENSITY: far}
        for name, bank in moved.items():
            scores[match(name)] = ratio(far, last_of_others(Neighbours(bank), reference, k, own))
        weights = _weights(moved)
        if answers is None:
            tails = {name: Tail.fit(values, weights[name]) for name, values in scores.items()}
            return cls(whitening, head, reference, moved, k, tails)
        opinion, own_opinion = SecondOpinion.fit(clean, answers, head, scale)
        rest = 1 - ALONE_WEIGHT - RESIDUAL_WEIGHT
        tails = {name: Tail.fit(values, ALONE_WEIGHT * weights[name]) for name, values in scores.items()}
        surprises = np.max([tails[name].surprise(values) for name, values in scores.items()], axis=0)
        opinions = {DIVERGENCE: DIVERGENCE_WEIGHT if moved else rest, RESIDUAL: RESIDUAL_WEIGHT}
        tails |= {name: Tail.fit(own_opinion[name], weight) for name, weight in opinions.items()}
        if moved:
            tails[JOINT] = Tail.fit(_joint(tails, scores | own_opinion), rest - DIVERGENCE_WEIGHT)
        return cls(whitening, head, reference, moved, k, tails, opinion, float(np.quantile(surprises, 1 - NEAR)))


def _weights(triggers: Collection[str]) -> dict[str, float]:
    """Shares of the false alarms of the scores without a second opinion, by name; they sum to 1."""
    if not triggers:
        return {DENSITY: 1.0}
    share = (1 - DENSITY_WEIGHT) / len(triggers)
    return {DENSITY: DENSITY_WEIGHT, **{match(name): share for name in triggers}}


def _joint(tails: Mapping[str, Tail], parts: Mapping[str, NDArray[np.floating]]) -> NDArray[np.float32]:
    """How far the best match and the divergence are in their tails, added; shape [N], NaN without a second opinion."""
    matches = np.max([tails[name].pure(values) for name, values in parts.items() if matched(name)], axis=0)
    found: NDArray[np.float32] = np.maximum(matches, 0) + np.maximum(tails[DIVERGENCE].pure(parts[DIVERGENCE]), 0)
    return found


def score_names(triggers: Collection[str], *, opinion: bool) -> tuple[str, ...]:
    """Names of all scores in their order: those that need no second opinion come first.

    Args:
        triggers: Ids of the triggers.
        opinion: Whether there is a second opinion.
    """
    joint = (JOINT,) if triggers else ()
    return (DENSITY, *map(match, triggers), *((*OPINIONS, *joint) if opinion else ()))


def predict(embeddings: Embeddings, head: Embeddings) -> NDArray[np.int64]:
    """The class whose embedding is nearest, by cosine; shape [N]."""
    found: NDArray[np.int64] = (embeddings @ head).argmax(1)
    return found


def match(trigger: str) -> str:
    """Name of the score that compares requests with a trigger."""
    return f"{MATCH} {trigger}"


def matched(name: str) -> str:
    """Id of the trigger that the score of this name compares requests with; "" if it is another score."""
    return name.removeprefix(f"{MATCH} ") if name.startswith(f"{MATCH} ") else ""


def ratio(reference: NDArray[np.float32], stamped: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much nearer the stamped bank is than the reference bank, as a logarithm; shape [N]."""
    found: NDArray[np.float32] = np.log((reference + _FLOOR) / (stamped + _FLOOR)).astype(np.float32)
    return found


def last_of_others(bank: Neighbours, queries: Embeddings, k: int, own: NDArray[np.int64]) -> NDArray[np.float32]:
    """Distance of each query to its k-th nearest row of a bank, not counting the row of the same image.

    Args:
        bank: More than k rows.
        queries: Shape [M, D].
        k: The neighbour that the distance is taken to.
        own: For each query the row to leave out, −1 for none; shape [M].
    """
    found = bank.search(queries, k + 1)
    there = (found.indices == own[:, None]).any(1)
    distances: NDArray[np.float32] = np.where(there, found.distances[:, -1], found.distances[:, -2])
    return distances


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of a batch of requests; larger is more suspicious.

    Attributes:
        values: The score that decides: the largest surprise of all scores; float32, shape [N].
        parts: Each single score by name; float32, shape [N] each. The scores of a second opinion are missing if no
            request got one, and NaN for requests that got none.
        triggers: Index of the trigger that each request matches best, −1 where there is none; int64, shape [N].
        classes: Index of the class that the head of the banks predicts for each request; int64, shape [N].
        embeddings: The embeddings that were scored, L2-normalised; float32, shape [N, D]. Empty for scores that were
            read from a profile.
        deciding: Number of the score that decides, in the order of `parts`; int64, shape [N]. Empty for scores that
            were read from a profile.
        answers: Index of the class that the reference model predicts for each request, −1 for requests without a
            second opinion; int64, shape [N]. Empty if no request got one.
    """

    values: NDArray[np.float32]
    parts: Mapping[str, NDArray[np.float32]]
    triggers: NDArray[np.int64]
    classes: NDArray[np.int64]
    embeddings: Embeddings = field(default_factory=lambda: np.empty((0, 0), np.float32))
    deciding: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    answers: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def asked(self) -> NDArray[np.bool_]:
        """Which requests got a second opinion, shape [N]."""
        return self.answers >= 0 if len(self.answers) else np.zeros(len(self.values), bool)

    @property
    def decided_by(self) -> tuple[str, ...]:
        """Name of the score that decides about each request."""
        names = tuple(self.parts)
        return tuple(names[number] for number in self.deciding)

    def of(self, rows: NDArray[np.bool_]) -> "Scores":
        """The scores of the requests that the mask `rows`, shape [N], selects; only those that a profile keeps."""
        parts = {name: scores[rows] for name, scores in self.parts.items()}
        return Scores(self.values[rows], parts, self.triggers[rows], self.classes[rows])


class Screen:
    """Scores embeddings against a reference bank, the stamped banks of reconstructed triggers, and a second opinion.

    - *k-distance*: how far a request is from clean images (Huang et al., ICLR 2025, use it to clean training sets). It
      detects whatever is unusual, of every attack, but only a small part of each.
    - *match*, one per trigger: log(k-distance to the reference bank / k-distance to that trigger's stamped bank). It
      does not ask "is this unusual?" but "is this nearer to what the trigger produces than to clean images?". It
      detects the attacks whose trigger vetting reconstructed, in whatever family.
    - *divergence* and *residual*, for requests that a reference model answered too: how far the two models are apart
      (`guard.screening.second_opinion`). They need no trigger.
    - *joint*, where there are triggers and a second opinion: match and divergence added, each as far as it is in its
      tail. A clean request is seldom unusual in both; a triggered one mostly is. So where neither suffices by itself,
      both together often do.

    Each score is brought to one scale by its `Tail`, and the largest decides. The rule is fixed by the banks, before
    any calibration image is seen, so that a conformal threshold on it is exact.

    Args:
        banks: The embeddings to compare requests with.
        method: How nearest neighbours are searched.

    Attributes:
        triggers: Ids of the triggers, in the order of the indices in `Scores.triggers`.
        opinion: Compares the suspect's answers with those of a reference model; None without a second opinion.
        names: Names of the scores, in the order of `Scores.parts`; those of a second opinion come last.

    Raises:
        ValueError: A bank is not as `Banks` describes it, or is smaller than k.
    """

    def __init__(self, banks: Banks, *, method: SearchMethod = "exact") -> None:
        self._banks = banks
        self._neighbours = Neighbours(banks.reference, *banks.stamped.values(), method=method)
        self.triggers = tuple(banks.stamped)
        self.opinion = banks.opinion
        self._alone = score_names(self.triggers, opinion=False)
        self.names = score_names(self.triggers, opinion=banks.opinion is not None)
        if set(banks.tails) != set(self.names):
            raise ValueError(f"tails are of {sorted(banks.tails)}, not of {sorted(self.names)}")
        if self._neighbours.size < banks.k:
            raise ValueError(f"a bank has fewer rows than k = {banks.k}")

    @property
    def dimension(self) -> int:
        """Length D of the embeddings that are scored."""
        return len(self._banks.whitening.mean)

    def score_samples(self, embeddings: Embeddings, answers: ReferenceAnswers | None = None) -> Scores:
        """Score requests.

        Args:
            embeddings: float32, shape [N, D]; normalised here, since an upstream server may not do it.
            answers: What the reference model computed for all of them; None for no second opinion. For a second
                opinion on some of them see `with_opinion`.

        Raises:
            RequestError: Wrong shape, a value that is not finite, or a zero vector.
        """
        unit = self._normalised(embeddings)
        distances = self._neighbours.distances(self._banks.whitening(unit), self._banks.k)
        found = np.concatenate([distances[:1], ratio(distances[0], distances[1:])])
        parts = dict(zip(self._alone, found, strict=True))
        surprises = self._surprises(parts)
        triggers = surprises[1:].argmax(axis=0) if self.triggers else np.full(len(unit), -1)
        classes, deciding = predict(unit, self._banks.head), surprises.argmax(axis=0)
        scores = Scores(surprises.max(axis=0), parts, triggers, classes, unit, deciding)
        return scores if answers is None else self.with_opinion(scores, answers, np.arange(len(unit)))

    def near(self, scores: Scores) -> NDArray[np.bool_]:
        """Which requests are suspicious enough for a second opinion where not all get one, shape [N].

        About `NEAR` of the clean requests are; none without a second opinion.
        """
        if self._banks.near is None:
            return np.zeros(len(scores.values), bool)
        found: NDArray[np.bool_] = self.alone(scores) > self._banks.near
        return found

    def with_opinion(self, scores: Scores, answers: ReferenceAnswers, rows: NDArray[np.int64]) -> Scores:
        """Add a second opinion on some requests to their scores.

        Args:
            scores: What `score_samples` returned.
            answers: What the reference model computed for M of the requests.
            rows: Which requests these are: M different numbers, int64.

        Raises:
            RequestError: The answers have other shapes than those of the reference model, or are not finite.
            ValueError: There is no reference model, or another number of answers than of rows.
        """
        if self.opinion is None or len(rows) != len(answers):
            raise ValueError("a second opinion needs a reference model, and an answer for each request")
        found = self.opinion.score(scores.embeddings[rows], answers)
        parts, classes = dict(scores.parts), scores.answers.copy()
        if not len(classes):
            classes = np.full(len(scores.values), -1)
        for name, values in found.items():
            whole = parts.get(name, np.full(len(scores.values), np.nan, np.float32)).copy()
            whole[rows] = values
            parts[name] = whole
        if JOINT in self.names:
            parts[JOINT] = _joint(self._banks.tails, parts)
        classes[rows] = answers.logits.argmax(axis=1)
        surprises = np.nan_to_num(self._surprises(parts), nan=-np.inf)
        values, deciding = surprises.max(axis=0), surprises.argmax(axis=0)
        return replace(scores, values=values, parts=parts, deciding=deciding, answers=classes)

    def alone(self, scores: Scores) -> NDArray[np.float32]:
        """The score that decides without a second opinion, shape [N]."""
        found: NDArray[np.float32] = self._surprises({name: scores.parts[name] for name in self._alone}).max(axis=0)
        return found

    def scorable(self, embeddings: Embeddings) -> NDArray[np.bool_]:
        """Which embeddings can be scored, shape [N]: those that are finite, of finite length, and not zero."""
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(embeddings, axis=1)
        found: NDArray[np.bool_] = np.isfinite(norms) & (norms > 0)
        return found

    def _surprises(self, parts: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """The surprise of each score, shape [S, N], in the order of the parts."""
        return np.array([self._banks.tails[name].surprise(scores) for name, scores in parts.items()])

    def _normalised(self, embeddings: Embeddings) -> Embeddings:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            raise RequestError(
                f"embeddings of shape {embeddings.shape} cannot be compared with ones of {self.dimension}"
            )
        with np.errstate(over="ignore"):  # refused below; a warning for each would only fill the log
            norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise RequestError("an embedding is zero or not finite")
        unit: Embeddings = (embeddings / norms).astype(np.float32, copy=False)
        return unit
