"""One verdict from several vettings of a model that differ in their seed alone. Imports without torch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import erfc, inf, sqrt
from statistics import NormalDist, fmean

from guard.errors import UsageError
from guard.vetting.results import Check, ClassStatistic, FamilyResult, ReconstructedTrigger, Vetting, leading
from guard.vetting.verdict import DOUBT, class_results, is_accused, is_close, is_valid, judge

CONFIRMATIONS = 3
"""Largest number of vettings, the first included, of a model whose verdict is close to a threshold."""
_LEAST, _MOST = 1e-300, 0.99
"""p-values outside are moved here before they are combined."""


def agreed(vettings: Sequence[Vetting]) -> Vetting:
    """Return one vetting with the evidence of several, and the verdict on it.

    Each seed splits the images otherwise, derives another reference model and starts its searches elsewhere, so that
    the evidence of a class varies. What it has in common counts: the p-values of a class in one family are combined by
    the mean of their normal scores (`combined`). A class is represented by the checks of one of the vettings that
    looked for its triggers, the one in the middle by the strength of the weakest that works. The rest is that of the
    first vetting; passes and seconds are those of all.

    Args:
        vettings: Of one model, with the same images, kind of reference, families and budget; at least one.

    Raises:
        UsageError: There is none.
    """
    if not vettings:
        raise UsageError("there is no vetting to agree with; vet the model with at least one seed")
    first = vettings[0]
    if len(vettings) == 1:
        return first
    results = tuple(_of_family(items) for items in zip(*(each.results for each in vettings), strict=True))
    ranked = class_results(results)
    chosen = {item.target: found for item in ranked if (found := _typical(vettings, item.target))}
    checks = tuple(check for target, each in chosen.items() for check in each.checks if check.target == target)
    verdict = judge(results, checks, significance=first.verdict.significance)
    said = Counter((each.verdict.outcome, each.verdict.target) for each in vettings)
    counts = ", ".join(
        f"{outcome}{'' if target is None else f' (class {target})'} by {count}"
        for (outcome, target), count in said.most_common()
    )
    reason = f"the evidence of {len(vettings)} vettings with different seeds was combined; alone they say {counts}"
    sure = {item.target for item in ranked if is_accused(item, checks, verdict.significance)}
    p_values = {item.target: item.p_value for item in ranked if not sure or item.target in sure}
    triggers = [
        replace(trigger, p_value=p_values[target])
        for target, each in chosen.items()
        if target in p_values and (sure or p_values[target] <= DOUBT)
        for trigger in _triggers((each, *vettings), target)
    ]
    return replace(
        first,
        verdict=replace(verdict, reasons=(*verdict.reasons, reason)),
        results=results,
        checks=checks,
        triggers=tuple(sorted(triggers, key=lambda trigger: trigger.p_value)),
        passes=sum(each.passes for each in vettings),
        seconds=sum(each.seconds for each in vettings),
    )


def until_clear(vettings: Iterable[Vetting]) -> Vetting:
    """Return what several vettings say together (`agreed`), as many of them as it takes to be far from a threshold.

    Args:
        vettings: As for `agreed`; those that are not needed are not asked for.

    Raises:
        UsageError: There is none.
    """
    done: list[Vetting] = []
    for vetting in vettings:
        done.append(vetting)
        found = agreed(done)
        if not is_close(found.verdict, found.results, found.checks):
            return found
    return agreed(done)


def combined(p_values: Sequence[float | None]) -> float | None:
    """Return the p-value of the mean of the normal scores of p-values that measure the same with different seeds.

    It is exact where the seeds change nothing, and too large otherwise: how much of a class's score is its own and how
    much is the seed's is not assumed. A missing value counts as 0.5: nothing hinted at the class with that seed.

    Args:
        p_values: One-sided, in [0, 1]; None for a class that was not compared.

    Returns:
        None if all are missing.
    """
    if all(p_value is None for p_value in p_values):
        return None
    normal = NormalDist()
    scores = [0.0 if p_value is None else -normal.inv_cdf(min(max(p_value, _LEAST), _MOST)) for p_value in p_values]
    return erfc(fmean(scores) / sqrt(2)) / 2  # `cdf` would lose the digits of small ones


def _of_family(items: Sequence[FamilyResult]) -> FamilyResult:
    """Return the results of one family with several seeds as one: means, and combined p-values."""
    found: dict[int, list[ClassStatistic]] = {}
    for item in items:
        for entry in item.classes:
            found.setdefault(entry.target, []).append(entry)
    classes = tuple(_of_class(entries, len(items)) for _, entries in sorted(found.items()))
    target, p_value = leading(classes, max(item.corrected_for or len(item.classes) for item in items))
    return replace(
        items[0],
        null=f"{items[0].null}; mean normal score of {len(items)} seeds",
        classes=classes,
        target=target,
        p_value=p_value,
        passes=sum(item.passes for item in items),
        seconds=sum(item.seconds for item in items),
    )


def _of_class(entries: Sequence[ClassStatistic], seeds: int) -> ClassStatistic:
    missing: list[float | None] = [None] * (seeds - len(entries))
    scores = [entry.score for entry in entries if entry.score is not None]
    return replace(
        entries[0],
        statistic=fmean(entry.statistic for entry in entries),
        success=fmean(entry.success for entry in entries),
        steps=max(entry.steps for entry in entries),
        score=sum(scores) / seeds if scores else None,
        p_value=combined([*(entry.p_value for entry in entries), *missing]),
    )


def _typical(vettings: Sequence[Vetting], target: int) -> Vetting | None:
    """Return the vetting in the middle of those that looked for triggers of a class, by its weakest that works."""
    tried = [each for each in vettings if any(check.target == target for check in each.checks)]
    ordered = sorted(tried, key=lambda each: _least_strength(each.checks, target))
    return ordered[len(ordered) // 2] if ordered else None


def _triggers(vettings: Sequence[Vetting], target: int) -> tuple[ReconstructedTrigger, ...]:
    """Return the triggers that the first of some vettings that kept any for a class kept for it."""
    kept = (tuple(trigger for trigger in each.triggers if trigger.target == target) for each in vettings)
    return next((found for found in kept if found), ())


def _least_strength(checks: Sequence[Check], target: int) -> float:
    return min((check.strength for check in checks if check.target == target and is_valid(check)), default=inf)
