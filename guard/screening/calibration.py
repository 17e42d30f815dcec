"""Calibrate a detector from embeddings of clean images: split them, fill the banks, set the threshold. numpy only."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.errors import ImageError
from guard.screening.conformal import Threshold
from guard.screening.detector import Detector
from guard.screening.hygiene import LIMIT, triggered
from guard.screening.neighbours import Embeddings
from guard.screening.screen import Banks, Scores, Screen, match
from guard.screening.second_opinion import ReferenceAnswers

BANK_SHARE, THRESHOLD_SHARE = 0.4, 0.4
"""Shares of the images that fill the banks and that set the threshold; false alarms are counted on the rest."""


@dataclass(frozen=True, eq=False)
class Split:
    """Which images are used for what: disjoint arrays of row numbers, int64.

    Attributes:
        banks: Images that fill the reference bank and, with triggers, the stamped banks.
        threshold: Images whose scores set the threshold, one of each group.
        held_out: Images on which false alarms are counted.
    """

    banks: NDArray[np.int64]
    threshold: NDArray[np.int64]
    held_out: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """A threshold, and what it was set from.

    Attributes:
        clean: Scores of the images that set the threshold.
        threshold: The threshold on all requests, whatever they are predicted as.
        left_out: Row of an image that was to set the threshold → id of the trigger that it seems to carry.
        held_out: Number of images that were kept out of banks and threshold.
        false_alarms: How many of these are flagged, all with a second opinion if there is a reference model.
        agreement: Share of the images that set the threshold to which the reference model gives the same answer, in
            [0, 1]; None without a reference model.
    """

    clean: Scores
    threshold: Threshold
    left_out: Mapping[int, str]
    held_out: int
    false_alarms: int
    agreement: float | None


def split(groups: NDArray[np.int64], seed: int) -> Split:
    """Split images at random into banks, threshold and held-out images, whole groups at a time.

    Of each group that sets the threshold one image is taken, at random. The scores of a group are alike, and say less
    than their number: a threshold from all of them may flag up to 1 / (m + 1) more clean requests than alpha for m
    groups of one size (Lee, Barber and Willett, "Distribution-free inference with hierarchical data", 2023). With one
    image of each group the conformal guarantee is exact. In the demo, with 200 groups, the difference is 0.1 percentage
    points at most (benchmarks/results/demo-false-alarms.md); with few groups it is large.

    Args:
        groups: Number of each image's group, shape [N].
        seed: Seed for the random split.
    """
    names, group = np.unique(groups, return_inverse=True)
    rank = _permutation(len(names), seed).argsort()[group]
    order = rank.argsort(kind="stable")
    first = round(BANK_SHARE * len(names))
    second = first + round(THRESHOLD_SHARE * len(names))
    banks, rest = np.split(order, [int((rank < first).sum())])
    threshold, held_out = np.split(rest, [int((rank < second).sum()) - len(banks)])
    drawn = np.random.default_rng(seed).permutation(threshold)
    _, one_of_each = np.unique(rank[drawn], return_index=True)
    return Split(banks, drawn[one_of_each], held_out)


def split_without_banks(count: int, seed: int) -> Split:
    """Split embeddings at random where the banks exist already: two thirds set the threshold."""
    order = np.random.default_rng(seed).permutation(count)
    size = round(count * THRESHOLD_SHARE / (1 - BANK_SHARE))
    return Split(order[:0], order[:size], order[size:])


def _permutation(count: int, seed: int) -> NDArray[np.int64]:
    """The permutation that torch.randperm draws from the same seed, so that splits of earlier releases stay the same.

    Both draw 32-bit numbers from MT19937; numpy guarantees that `RandomState` never changes.
    """
    drawn = np.frombuffer(np.random.RandomState(seed % 2**32).bytes(4 * count), "<u4").astype(np.int64)
    order = np.arange(count)
    for place, step in enumerate(drawn[:-1] % np.arange(count, 1, -1)):
        order[[place, place + step]] = order[[place + step, place]]
    return order


def check_bank_size(size: int, k: int) -> None:
    """Make sure that a bank has more images than the neighbour that distances are taken to.

    Raises:
        ImageError: It has too few.
    """
    if size <= k:
        raise ImageError(
            f"banks with k = {k} need more than {k} images, there are {size}; "
            f"give more than {round(k / BANK_SHARE)} images in all"
        )


def fit_banks(
    clean: Embeddings,
    stamped: Mapping[str, tuple[int, Embeddings]],
    head: Embeddings,
    *,
    k: int,
    answers: ReferenceAnswers | None = None,
    scale: float = 1.0,
) -> tuple[Banks, dict[int, str]]:
    """Fill the banks, without the images that seem to carry a trigger (`guard.screening.hygiene`).

    Args:
        clean: Embeddings of clean images, shape [N, D], L2-normalised.
        stamped: For each trigger the class index that it leads to, and embeddings of the same images with the trigger,
            shape [N, D].
        head: Class embeddings, shape [D, C].
        k: The neighbour that distances are taken to.
        answers: What a reference model computed for the images; None for no second opinion.
        scale: Factor between cosine and logit of the suspect; needed for a second opinion.

    Returns:
        The banks; and for each row of `clean` that was left out the id of the trigger that it seems to carry.

    Raises:
        ImageError: There are too few images for this k, or their embeddings make no bank.
    """
    try:
        carrying = triggered(clean, stamped, head, k=k)
        kept = np.array([row not in carrying for row in range(len(clean))])
        check_bank_size(int(kept.sum()), k)
        moved = {name: bank[kept] for name, (_, bank) in stamped.items()}
        opinions = None if answers is None else answers[kept]
        banks = Banks.fit(clean[kept], moved, head, k=k, answers=opinions, scale=scale)
    except ValueError as error:
        raise ImageError(f"these images make no bank: {error}") from error
    return banks, carrying


def calibrate(
    banks: Banks,
    embeddings: Embeddings,
    held_out: Embeddings,
    alpha: float,
    *,
    per_class: bool = False,
    answers: tuple[ReferenceAnswers, ReferenceAnswers] | None = None,
) -> Calibration:
    """Set the threshold, and count false alarms.

    Args:
        banks: What requests are compared with.
        embeddings: Embeddings of clean images that are in no bank, shape [N, D]; they set the threshold.
        held_out: Embeddings of other clean images, shape [M, D]; false alarms are counted on them.
        alpha: False-alarm rate, in (0, 1).
        per_class: Whether the rate must apply to each predicted class that has enough images.
        answers: What the reference model computed for the images of `embeddings`, and for those of `held_out`; needed
            if the banks have a second opinion.

    Raises:
        RequestError: The embeddings do not fit the banks.
        UsageError: There are too few embeddings for alpha.
    """
    screen = Screen(banks)
    own, others = (None, None) if answers is None else answers
    clean = screen.score_samples(embeddings, own)
    agreement = None if own is None else float((clean.answers == clean.classes).mean())
    surprises = [banks.tails[match(name)].pure(clean.parts[match(name)]) for name in screen.triggers]
    carrying = np.max(surprises, axis=0) > LIMIT if surprises else np.zeros(len(embeddings), bool)
    left_out = {int(row): screen.triggers[clean.triggers[row]] for row in np.flatnonzero(carrying)}
    dropped, clean = clean.classes[carrying], clean.of(~carrying)
    detector = Detector(screen, clean, alpha, per_class=per_class, left_out=dropped)
    alarms = int(detector.score(held_out, others).flags.sum()) if len(held_out) else 0
    return Calibration(clean, detector.threshold, left_out, len(held_out), alarms, agreement)
