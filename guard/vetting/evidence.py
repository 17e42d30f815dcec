"""Evidence: what a method measured, the null it is compared with, and its p-value. Imports without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MIN_NULL = 4
"""Fewest other classes from which a spread is estimated; below that there is no p-value."""
MIN_SPREAD = 0.15
"""Floor of the null's standard deviation, in log norm. One search repeats within about 0.1 over seeds (pooled over the
classes of the digits base), a ratio of two within 0.14; a smaller spread among few classes is chance, and would make
any difference significant."""


@dataclass(frozen=True)
class ClassEvidence:
    """What inversion found for one candidate class.

    Attributes:
        target: Class index.
        name: Class name.
        reached: Whether a trigger of the family reached the success rate while its norm was being minimised.
        norm: Norm of the smallest such trigger, in the family's unit (of the last one tried if not reached).
        success: Its success on images kept out of the search, in [0, 1].
        margin: Mean logit margin of the target on those images; positive where it wins.
        base_norm: The norm found on the base; None without a base.
        base_success: Success of the suspect's trigger on the base: a natural feature works there too.
        statistic: log(norm / base_norm), or log(norm) without a base; None if either search failed.
        score: (statistic − mean of the other classes) / their prediction standard error; None without a null.
        p_value: One-sided, uncorrected: how often an ordinary class would be this much smaller than the others.
    """

    target: int
    name: str
    reached: bool
    norm: float
    success: float
    margin: float
    base_norm: float | None = None
    base_success: float | None = None
    statistic: float | None = None
    score: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Evidence:
    """One family's statistic over all candidate classes.

    Attributes:
        method: Name and version of the method.
        family: Trigger family that was searched.
        norm_unit: Unit of the norms.
        statistic: What is compared, in words.
        null: What it is compared with, in words.
        control: `base` if paired with a trusted base model, `classes` if only with the suspect's other classes.
        classes: One entry per candidate class.
        target: The class with the smallest p-value; None where no class has one.
        p_value: Its p-value, corrected for the number of classes and families tested; 1 where no class has one.
        seed: Reproduces the search.
        passes: Images pushed through image towers, the base's included.
        seconds: Wall-clock time.
    """

    method: str
    family: str
    norm_unit: str
    statistic: str
    null: str
    control: Literal["base", "classes"]
    classes: tuple[ClassEvidence, ...]
    target: int | None
    p_value: float
    seed: int
    passes: int
    seconds: float


def outliers(statistics: Sequence[float | None]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score each class against all others, and its one-sided p-value for being smaller.

    Under the null the statistics are exchangeable and roughly normal, so that one of them, minus the mean of the other
    n, over s·√(1 + 1/n), follows Student's t with n − 1 degrees of freedom (the prediction interval). Unlike the
    MAD rule of Neural Cleanse ("anomaly index > 2"), which on normal statistics accuses 33 % of clean ten-class models
    and 88 % of clean hundred-class ones (20,000 simulated), this gives a p-value that accounts for how few classes
    there are. A class is left out of its own null, so that the target
    does not widen the spread that it is judged by.

    Args:
        statistics: One per class; None where a search failed. These neither get a score nor join a null.

    Returns:
        Scores and p-values, shape [K]; NaN for a class without a statistic or with fewer than `MIN_NULL` others.
    """
    from scipy.stats import t as student

    values = np.array([np.nan if value is None else value for value in statistics], dtype=np.float64)
    scores, p_values = np.full_like(values, np.nan), np.full_like(values, np.nan)
    for k in np.flatnonzero(~np.isnan(values)):
        others = np.delete(values, k)
        others = others[~np.isnan(others)]
        if len(others) < MIN_NULL:
            continue
        spread = max(float(others.std(ddof=1)), MIN_SPREAD)
        scores[k] = (values[k] - others.mean()) / (spread * np.sqrt(1 + 1 / len(others)))
        p_values[k] = student.cdf(scores[k], df=len(others) - 1)
    return scores, p_values
