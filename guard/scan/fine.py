"""The fine stage of a scan: groups among the most suspicious pairs, and what they are.

After CASCADE (2026), which filters coarsely before it looks closely; its code is not public, and everything below is
our own. Images with one trigger are scattered thinly over small samples of a set, and so they pass the coarse stage;
but among the pairs that pass they lie close together. So do ordinary clusters: what tells them apart is what their
captions and, above all, their pixels have in common (`guard.scan.groups`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from guard._types import Floats, Rows
from guard.scan.captions import Captions, Reader
from guard.scan.groups import SHOWN, SMALLEST, Group, common_word, components, count_words, examine, words
from guard.scan.membership import membership, projections
from guard.scan.nearest import Embeddings, Reference, sampled
from guard.scan.patterns import WordPattern, find_patterns
from guard.scan.results import ScanSettings
from guard.scan.vectors import gathered, slices

_EDGES = 8
_CLOSE = 0.3
"""Two candidates belong together if their distance is this part of that to the 16th neighbour in a sample."""
_SAMPLE, _NEIGHBOUR, _PART = 256, 16, 4
"""With fewer than 16 images of a trigger among 256, the 16th neighbour of one of them lies elsewhere: at most 6 % of
the pairs may be poisoned by one trigger. Of a small set, a quarter is sampled."""
_MOST_GROUPS = 40
_COMPARED = 256
"""Images that a group is compared with."""
_MEMBER = 0.5
_SEPARATE = 3.0
"""Separation from which a group is taken for one of its own (`Membership`)."""
_SMALLEST_SUSPECTED, _GROWTH = 20, 2
"""A group without a pattern must have so many pairs, and not more than twice as many as it was found with."""
_ACCUSED = ("trigger", "suspected")
_ORDER = ("trigger", "suspected", "copies", "noise", "cluster")


def candidates(scores: NDArray[np.float64], share: float, most: int) -> Rows:
    """The pairs with the largest scores, in ascending order of their numbers."""
    count = min(max(1, round(share * len(scores))), most, len(scores))
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def find_groups(parts: Sequence[Embeddings], chosen: Rows, *, seed: int, device: torch.device) -> list[Rows]:
    """Groups of candidates that lie close together, measured by how far apart images lie elsewhere.

    Args:
        parts: Embeddings of all images, of length 1.
        chosen: Numbers of the candidates, in ascending order.
        seed: Of the sample that gives the measure.
        device: Where neighbours are searched.
    """
    count = sum(part.shape[0] for part in parts)
    rows = sampled(count, min(_SAMPLE, count // _PART), (seed, 1))
    own = gathered(parts, chosen)
    edges = min(_EDGES, len(own) - 1)
    if edges < 1 or len(rows) < _NEIGHBOUR + 2:
        return []
    places = np.minimum(np.searchsorted(rows, chosen), len(rows) - 1)
    itself = np.where(rows[places] == chosen, places, -1)[:, None]
    sample, among = Reference([gathered(parts, rows)], device=device), Reference([own], device=device)
    found: list[tuple[Rows, NDArray[np.bool_]]] = []
    for part in slices(len(own)):
        far = sample.search(own[part], _NEIGHBOUR, without=itself[part]).distances[:, -1:]
        numbers = np.arange(part.start, part.stop)[:, None]
        near = among.search(own[part], edges, without=numbers)
        found.append((chosen[near.rows], near.distances <= _CLOSE * far))
    neighbours, reach = (np.concatenate(each) for each in zip(*found, strict=True))
    return components(chosen, neighbours, reach)[:_MOST_GROUPS]


def examine_groups(
    found: Sequence[Rows],
    scores: NDArray[np.float64],
    captions: Captions,
    read: Reader,
    *,
    seed: int,
) -> tuple[Group, ...]:
    """Say what each group is, from captions and images.

    Args:
        found: The groups.
        scores: Scores of all pairs.
        captions: Captions of all pairs.
        read: Reads images.
        seed: Of the choice of images, and of comparisons.
    """
    if not found:
        return ()
    total = len(scores)
    generator = np.random.default_rng((seed, 2))
    shown = [np.sort(generator.choice(rows, min(SHOWN, len(rows)), replace=False)) for rows in found]
    grouped = np.concatenate(found)
    texts, digests = captions.of(grouped)
    everywhere: Counter[str] = Counter()
    wanted = {word for text in texts.values() for word in words(text)}
    for _, each in captions.all():
        count_words(each, wanted, everywhere)
    common = [common_word([texts[int(row)] for row in rows], everywhere, total) for rows in found]
    others = _others({word for word, _, _ in common}, captions, grouped, generator)
    images = read(np.union1d(np.concatenate(shown), np.concatenate([*others.values(), grouped[:0]])))
    groups = []
    for rows, visible, about in zip(found, shown, common, strict=True):
        seen = [int(row) for row in visible if int(row) in images]
        compared = [images[int(row)] for row in others.get(about[0], ()) if int(row) in images]
        groups.append(
            examine(
                [int(row) for row in rows[np.argsort(-scores[rows], kind="stable")]],
                about,
                [digests[int(row)] for row in rows],
                np.stack([images[row] for row in seen]) if seen else None,
                np.stack(compared) if compared else None,
                seen,
                seed=seed,
            )
        )
    return tuple(groups)


def _others(wanted: set[str], captions: Captions, grouped: Rows, generator: np.random.Generator) -> dict[str, Rows]:
    """For each word, pairs in no group whose caption has it; those are what a group with this word is compared with."""
    found: dict[str, list[int]] = {word: [] for word in wanted}
    inside = set(grouped.tolist())
    for start, each in captions.all():
        for place, text in enumerate(each):
            if start + place not in inside:
                for word in words(text) & wanted:
                    found[word].append(start + place)
    return {
        word: np.sort(generator.choice(rows, min(_COMPARED, len(rows)), replace=False))
        for word, rows in sorted(found.items())
        if rows
    }


def settle(
    group: Group, parts: Sequence[Embeddings], captions: Captions, *, seed: int
) -> tuple[Group, dict[int, float]]:
    """Find all pairs that belong to a group, candidates or not, and their number with an interval.

    Only pairs with the group's word in their caption can belong to it: others do not teach its target. Where they do
    not divide in two, a trigger keeps the pairs that it was found with, and a group without a pattern is an ordinary
    cluster.

    Args:
        group: A group of the kind `trigger` or `suspected`.
        parts: Embeddings of all images, of length 1.
        captions: Captions of all pairs.
        seed: Of the interval.

    Returns:
        The group with all its pairs, and the probability of each pair that may belong to it.
    """
    rows = captions.having(group.word)
    members = np.isin(rows, group.pairs)
    if members.sum() >= SMALLEST and not members.all():
        own: Floats = gathered(parts, rows)
        found = membership(projections(own, own[members], own[~members]), members, seed=seed)
        if found.separation >= _SEPARATE:
            inside = found.probabilities >= _MEMBER
            order = np.argsort(-found.probabilities[inside], kind="stable")
            pairs = tuple(int(row) for row in rows[inside][order])
            if group.kind == "trigger" or (len(pairs) >= _SMALLEST_SUSPECTED and len(pairs) <= _GROWTH * members.sum()):
                probabilities = {int(row): float(p) for row, p in zip(rows, found.probabilities, strict=True)}
                return replace(group, pairs=pairs, count=found.count, low=found.low, high=found.high), probabilities
    if group.kind == "trigger":
        return group, dict.fromkeys(group.pairs, 1.0)
    return replace(group, kind="cluster"), {}


def refine(
    found: Sequence[Rows],
    scores: NDArray[np.float64],
    parts: Sequence[Embeddings],
    captions: Captions,
    read: Reader,
    *,
    seed: int,
) -> tuple[list[Group], dict[int, float]]:
    """Examine and settle groups, and the probability of pairs to have a trigger.

    Arguments are those of `find_groups`, `examine_groups` and `settle`.
    """
    groups, probabilities = [], dict[int, float]()
    for group in examine_groups(found, scores, captions, read, seed=seed):
        settled = group
        if group.kind in _ACCUSED:
            settled, each = settle(group, parts, captions, seed=seed)
            _raise(probabilities, each)
        groups.append(settled)
    return groups, probabilities


def add_patterns(
    groups: Sequence[Group],
    probabilities: dict[int, float],
    patterns: Sequence[WordPattern],
    scores: NDArray[np.float64],
    captions: Captions,
    read: Reader,
    *,
    seed: int,
) -> list[Group]:
    """Add the pairs that stand apart by their pixels to a group that has them already, or as a group of their own.

    A pattern half of whose pairs are in groups with another word is the same trigger, seen through this one.

    Args:
        groups: Groups of embeddings.
        probabilities: Of pairs to have a trigger; those of the patterns are added.
        patterns: What `find_patterns` found.
        scores: Scores of all pairs.
        captions: Captions of all pairs.
        read: Reads images.
        seed: Of comparisons.
    """
    all_groups = list(groups)
    # The target's word has all pairs with the trigger, another common word only some of the same pairs.
    for pattern in sorted(patterns, key=lambda pattern: -len(pattern.pairs)):
        own, divided = pattern.pairs, pattern.membership
        accused = [each.pairs for each in all_groups if each.kind in _ACCUSED and each.word != pattern.word]
        if len(own) < SMALLEST or 2 * len(set(own.tolist()) & set().union(*accused)) >= len(own):
            continue
        (group,) = examine_groups([own], scores, captions, read, seed=seed)
        if group.kind not in _ACCUSED:
            continue
        group = replace(group, kind="trigger", count=divided.count, low=divided.low, high=divided.high)
        for other in [each for each in all_groups if each.word == group.word and _same(each, group)]:
            all_groups.remove(other)
            if other.kind in _ACCUSED:
                group = _united(group, other)
        _raise(probabilities, dict(zip(pattern.rows.tolist(), divided.probabilities.tolist(), strict=True)))
        all_groups.append(group)
    return all_groups


def _raise(probabilities: dict[int, float], more: Mapping[int, float]) -> None:
    for row, value in more.items():
        probabilities[row] = max(value, probabilities.get(row, 0.0))


def _same(one: Group, two: Group) -> bool:
    """Whether half of the smaller group is in the other."""
    return 2 * len(set(one.pairs).intersection(two.pairs)) >= min(len(one.pairs), len(two.pairs))


def _united(one: Group, two: Group) -> Group:
    """One group, by pixels, with the pairs of another, by embeddings."""
    known = set(one.pairs)
    further = [row for row in two.pairs if row not in known]
    count, low, high = (max(getattr(one, name), getattr(two, name)) for name in ("count", "low", "high"))
    return replace(one, pairs=(*one.pairs, *further), count=count, low=low, high=max(high, len(one.pairs)))


def examine_set(
    parts: Sequence[Embeddings],
    scores: NDArray[np.float64],
    captions: Captions,
    read: Reader,
    settings: ScanSettings,
    device: torch.device,
) -> tuple[Rows, tuple[Group, ...], dict[int, float]]:
    """The whole fine stage.

    Args:
        parts: Embeddings of all images, of length 1.
        scores: Scores of all pairs.
        captions: Captions of all pairs.
        read: Reads images.
        settings: How many candidates and words are looked at, and the seed.
        device: Where neighbours are searched.

    Returns:
        The candidates; groups, triggers first; and the probability of pairs to have a trigger.
    """
    seed = settings.seed
    chosen = candidates(scores, settings.share, settings.most)
    found = find_groups(parts, chosen, seed=seed, device=device)
    groups, probabilities = refine(found, scores, parts, captions, read, seed=seed)
    patterns = find_patterns(captions, read, most=settings.words, seed=seed) if settings.words else []
    groups = add_patterns(groups, probabilities, patterns, scores, captions, read, seed=seed)
    order = sorted(groups, key=lambda group: (_ORDER.index(group.kind), -len(group.pairs), group.pairs[:1]))
    return chosen, tuple(order), probabilities
