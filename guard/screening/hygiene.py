"""Find reference images that carry a trigger: a bank with such images would let the attacker's requests pass.

Clean images are collected from somewhere, and whoever poisoned the model may have been there too. A triggered image in
the reference bank has other triggered images for neighbours, so that it looks as ordinary as any image; it is found by
a comparison with images that are surely clean.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from guard.screening.neighbours import Embeddings, Neighbours
from guard.screening.screen import Tail, last_of_others, predict, ratio
from guard.screening.whitening import Whitening

LIMIT = 5.0
"""Surprise of a match above which an image is left out; if the tail were exponential, about one clean image in 1,500.
On the zoo `small` of seed 0, a limit of 4 leaves out ten times as many clean images, and a limit of 7 a third fewer of
the triggered ones."""
_CORE = 0.5
"""Share of the images of a target class that the others are compared with first: those farthest from where the trigger
puts images. They are clean as long as at most half of the class carries the trigger."""
_ROUNDS = 2
"""Number of comparisons; more of them let clusters of triggered images back in, one after the other."""


def triggered(
    clean: Embeddings, stamped: Mapping[str, tuple[int, Embeddings]], head: Embeddings, *, k: int
) -> dict[int, str]:
    """The images of a bank that seem to carry a trigger.

    This is a forward search: for the target class of each trigger, the half of the images nearest to the stamped bank
    is set aside, the match with the trigger is learned from the rest, and images that do not stand out return. Then
    this is repeated once, with the images that are left.

    Args:
        clean: Embeddings of the bank's images, shape [N, D], L2-normalised.
        stamped: For each trigger the class index that it leads to, and embeddings of the same images with the trigger,
            shape [N, D].
        head: Class embeddings, shape [D, C].
        k: The neighbour that distances are taken to.

    Returns:
        Row of each such image → the trigger that it matches.
    """
    classes, own = predict(clean, head), np.arange(len(clean))
    kept = ~np.isin(classes, [target for target, _ in stamped.values()])
    if not stamped:
        return {}
    others = kept if kept.sum() > k else np.ones_like(kept)
    whitening = Whitening.fit(clean[others], classes[others])
    moved = whitening(clean)
    for target, bank in stamped.values():
        distances = last_of_others(Neighbours(whitening(bank)), moved, k, own)
        rows = classes == target
        if rows.any():
            kept |= rows & (distances >= np.quantile(distances[rows], _CORE))
    surprises = np.zeros((len(stamped), len(clean)))
    for _ in range(_ROUNDS):
        surprises = _surprises(clean, stamped, classes, kept, k)
        kept = surprises.max(0) <= LIMIT
    names, best = list(stamped), surprises.argmax(0)
    return {int(row): names[best[row]] for row in np.flatnonzero(~kept)}


def _surprises(
    clean: Embeddings,
    stamped: Mapping[str, tuple[int, Embeddings]],
    classes: NDArray[np.int64],
    kept: NDArray[np.bool_],
    k: int,
) -> NDArray[np.float64]:
    """How far the match of each image with each trigger is in the tail of the kept images; shape [T, N]."""
    whitening = Whitening.fit(clean[kept], classes[kept])
    moved = whitening(clean)
    place = np.full(len(clean), -1)
    place[kept] = np.arange(kept.sum())
    far = last_of_others(Neighbours(moved[kept]), moved, k, place)
    found = []
    for _, bank in stamped.values():
        scores = ratio(far, last_of_others(Neighbours(whitening(bank[kept])), moved, k, place))
        found.append(Tail.fit(scores[kept], 1.0).pure(scores))
    return np.stack(found).astype(np.float64)
