"""Null distributions: how far an ordinary class may lie above the others.

The other classes of the same model show where an ordinary class lies. Ten classes are too few to show how widely they
spread: with nine others Student's t has eight degrees of freedom, and an outlier of five standard deviations has only
p = 0.0005, which does not survive the correction for the number of classes. The spread is therefore moderated, as in
the analysis of microarrays (Smyth, "Linear models and empirical Bayes methods", 2004, §3 and 6.2): the variance among
the classes of this model is shrunk towards that of clean models, and the degrees of freedom of both add up. How much
the clean models count follows from how much their own variances differ; if they have nothing in common, they do not
count at all.

There are two departures from Smyth, both against false alarms on a model that is unlike those of the table, such as one
that was fine-tuned on other images: the moderated variance is never smaller than the suspect's own, and the table is
worth at most `MAX_DEGREES` degrees of freedom.

Where `nulls.json` has no entry, the variance is not moderated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from guard.classifiers.digest import sha256

MIN_NULL = 4
"""Smallest number of other classes from which a spread is estimated; with fewer there is no p-value."""
_TABLE, _TEXT_TABLE = "nulls.json", "text_nulls.json"
MAX_DEGREES = 20.0
"""Largest number of degrees of freedom that a prior may add. With one clean model at a time left out of the table, an
unlimited prior accuses those that were fine-tuned on shifted images."""
_MOST_DEGREES = 1e3
_LOOKS = 2
"""Factor for looking at a class together with one more of the largest others."""


@dataclass(frozen=True)
class Prior:
    """The variance among classes that clean models have.

    Attributes:
        variance: Typical variance of the statistic, in its squared unit.
        degrees: Degrees of freedom that this variance is worth.
        models: Number of clean models that the variance was estimated from.
    """

    variance: float
    degrees: float
    models: int


@dataclass(frozen=True)
class Largest:
    """The largest statistic of any class that clean models have.

    Attributes:
        mean: Mean over the models.
        deviation: Standard deviation over the models.
        models: Number of clean models; at least 2.
    """

    mean: float
    deviation: float
    models: int

    def p_value(self, statistic: float) -> float:
        """Return how often the largest statistic of another clean model would be as large: Student's t prediction."""
        spread = self.deviation * (1 + 1 / self.models) ** 0.5
        return _upper_tail((statistic - self.mean) / spread, self.models - 1)


def _upper_tail(value: float, degrees: float) -> float:
    """How often a number of Student's t distribution is larger than a value."""
    from scipy.special import stdtr  # scipy.stats says the same, and takes seconds to import

    return float(stdtr(degrees, -value))


NO_PRIOR = Prior(1.0, 0.0, 0)
"""No prior knowledge; with no degrees of freedom, its variance does not matter."""


@cache
def table_digest() -> str:
    """Return what tells the shipped table from others: results that were judged with another are another's."""
    return sha256(_read(_TABLE))[:12]


def _read(name: str) -> bytes:
    return resources.files("guard.vetting").joinpath(name).read_bytes()


@cache
def _table() -> tuple[dict[str, Prior], dict[str, Largest]]:
    table = json.loads(_read(_TABLE))
    priors = {key: Prior(**entry) for key, entry in table["priors"].items()}
    return priors, {key: Largest(**entry) for key, entry in table.get("largest", {}).items()}


def prior(reference_model: str, family: str, steps: int) -> Prior:
    """Return the shipped prior for a kind of reference model and a family; `NO_PRIOR` where there is none.

    It is that of the largest number of steps up to `steps` that was measured: what a few more steps change is less than
    what models differ by.
    """
    start = f"{reference_model}/{family}/"
    known = {int(key.rpartition("/")[2]): entry for key, entry in _table()[0].items() if key.startswith(start)}
    measured = [count for count in known if count <= steps]
    return known[max(measured)] if measured else NO_PRIOR


def largest(reference_model: str, family: str) -> Largest | None:
    """Return what the shipped table knows of the largest statistic of clean models; None where it knows nothing."""
    return _table()[1].get(f"{reference_model}/{family}")


@cache
def _text_table() -> dict[str, Largest]:
    return {key: Largest(**entry) for key, entry in json.loads(_read(_TEXT_TABLE))["differences"].items()}


def text_null(reference_model: str, family: str) -> Largest | None:
    """Return what honest fine-tunings of text towers have of a statistic; None where the shipped table has none.

    The statistic is the largest lead less that with the two towers exchanged (`guard.vetting.text_examination`).
    """
    return _text_table().get(f"{reference_model}/{family}")


def estimate(variances: Sequence[float], degrees: Sequence[int]) -> Prior:
    """Estimate the scaled inverse χ² distribution that sample variances come from (Smyth 2004, §6.2).

    Args:
        variances: One sample variance per clean model, above 0.
        degrees: Degrees of freedom of each sample variance.
    """
    from scipy.special import digamma, polygamma

    half = np.asarray(degrees, dtype=np.float64) / 2
    logs = np.log(np.asarray(variances, dtype=np.float64)) - digamma(half) + np.log(half)
    return _fitted(float(logs.mean()), float(logs.var(ddof=1) - polygamma(1, half).mean()), len(variances))


def joined(first: Prior, second: Prior, degrees: int) -> Prior:
    """Return what `estimate` makes of the models of two estimates together.

    The two say all that is needed of their models, but for one: where the variances of an estimate differ less than by
    chance, here they differ as chance makes them differ.

    Args:
        first: An estimate from at least two models.
        second: An estimate from at least two others.
        degrees: Degrees of freedom of the sample variance of each model.
    """
    from scipy.special import digamma, polygamma

    own = float(polygamma(1, degrees / 2))
    parts = [
        (
            each.models,
            float(np.log(each.variance) - digamma(each.degrees / 2) + np.log(each.degrees / 2)),
            float(polygamma(1, each.degrees / 2)) + own,
        )
        for each in (first, second)
    ]
    models, mean, spread = pooled(*parts)
    return _fitted(mean, spread - own, models)


def pooled(first: tuple[int, float, float], second: tuple[int, float, float]) -> tuple[int, float, float]:
    """Return the number, mean and sample variance of two samples together, from those of each."""
    (n, mean, variance), (m, other, spread) = first, second
    between = n * m / (n + m) * (mean - other) ** 2
    together = (n - 1) * variance + (m - 1) * spread + between
    return n + m, (n * mean + m * other) / (n + m), together / (n + m - 1)


def _fitted(mean: float, excess: float, models: int) -> Prior:
    """The prior of which log variances have this mean, and differ by so much more than by chance."""
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma

    if excess <= float(polygamma(1, _MOST_DEGREES / 2)):
        degrees = _MOST_DEGREES  # the variances differ no more than chance makes them differ
    else:
        degrees = 2 * brentq(lambda value: float(polygamma(1, value)) - excess, 1e-3, _MOST_DEGREES / 2)
    shift = float(digamma(degrees / 2)) - float(np.log(degrees / 2))
    return Prior(float(np.exp(mean + shift)), degrees, models)


def outliers(
    statistics: Sequence[float | None],
    known: Prior = NO_PRIOR,
    reference: Sequence[bool] | None = None,
    alike: Mapping[int, NDArray[np.bool_]] = MappingProxyType({}),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score each class against the others, and compute its one-sided p-value for being larger.

    Under the null the statistics are exchangeable and roughly normal, so that one of them, minus the mean of n others,
    over s·√(1 + 1/n), follows Student's t, with s moderated by `known`. A class is left out of its own null, so that
    the target does not widen the spread by which it is judged. Several targets would widen it for each other. So a
    class is also looked at together with the largest other one, the two largest, and so on up to a third of all:
    the smallest of them is compared with the rest (as in Rosner's test for several outliers, Technometrics 1983), with
    its p-value times `_LOOKS` for each. That costs next to nothing, since the largest ordinary classes are rarely far
    from the rest: of 6,000 simulated clean models with 10 and with 13 classes, 0.7 and 1.1 % had a corrected
    p-value of at most 1 %, in place of 0.6 and 1.0 %. Not up to half: classes may be of two kinds by nature.

    The MAD rule of Neural Cleanse and CLIP-Inspector ("anomaly index > 2") accuses 33 % of clean ten-class models and
    88 % of clean hundred-class ones on normal statistics (20,000 simulated).

    Args:
        statistics: One per class; None where a class has none, and then it neither gets a score nor joins a null.
        known: Prior knowledge about the variance, from clean models.
        reference: Whether each class is part of the null; by default all are.
        alike: For some of the classes, which ones resemble it, shape [K]: these are left out of its null, unless fewer
            than `MIN_NULL` others were left.

    Returns:
        Scores and p-values, shape [K]; NaN for a class without a statistic or with fewer than `MIN_NULL` others.
    """
    values = np.array([np.nan if value is None else value for value in statistics], dtype=np.float64)
    usable = ~np.isnan(values) & (np.ones(len(values), bool) if reference is None else np.asarray(reference, bool))
    scores, p_values = np.full_like(values, np.nan), np.full_like(values, np.nan)
    for k in np.flatnonzero(~np.isnan(values)).tolist():
        null = usable & (np.arange(len(values)) != k)
        unlike = null & ~alike[k] if k in alike else null
        others = values[unlike if unlike.sum() >= MIN_NULL else null]
        if len(others) < MIN_NULL:
            continue
        largest = np.sort(others)[::-1]
        for removed in range(1 + _removed(len(others))):
            smallest = np.append(largest[:removed], values[k]).min()
            score, p_value = _compared(smallest, largest[removed:], known)
            if removed == 0 or _LOOKS**removed * p_value < p_values[k]:
                scores[k], p_values[k] = score, _LOOKS**removed * p_value
    return scores, p_values


def _removed(others: int) -> int:
    """How many of the largest other classes are looked at together with a class: a third of all, with the class itself.

    At least `MIN_NULL` are left to compare them with.
    """
    return max(0, min((others + 1) // 3 - 1, others - MIN_NULL))


def _compared(value: float, others: NDArray[np.float64], known: Prior) -> tuple[float, float]:
    """The score of a value against others, and its p-value."""
    degrees, own = min(known.degrees, MAX_DEGREES), len(others) - 1
    spread = float(others.var(ddof=1))
    variance = max(spread, (degrees * known.variance + own * spread) / (degrees + own))
    score = float((value - others.mean()) / np.sqrt(max(variance, 1e-12) * (1 + 1 / len(others))))
    return score, _upper_tail(score, degrees + own)
