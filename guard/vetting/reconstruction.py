"""Reconstruct the triggers of the classes that stand out, and check them on held-out images."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from guard.triggers import FAMILIES, Raw
from guard.vetting.budgets import SearchSettings
from guard.vetting.inspection import RADII
from guard.vetting.inversion import Reconstruction
from guard.vetting.results import Check, FamilyResult, ReconstructedTrigger, ReferenceKind
from guard.vetting.searches import Searches
from guard.vetting.verdict import DOUBT, NOTICED, class_results, is_accused, is_valid, suspects

_MOST_SUSPECTS = 4
"""Largest number of classes for which triggers are reconstructed."""
_TRIES = 3
"""Number of families in which a suspect's trigger is reconstructed: those in which it stands out most. More are tried
only until one passes its check. Each try costs as much as the inspection of several classes."""
_AS_NEAR = 2.0
"""A class's second trigger is kept for screening if it is at most so many times as strong as its first, each relative
to the radius of its family. The family that needs the least is nearest to the attacker's own; one that only gets there
by force stamps the bank with something else, and blurs the match."""

Start = Callable[[str, int], Raw]
"""From a family and a class index to the unconstrained parameters with which their inspection ended."""


def reconstruct_suspects(
    searches: Searches,
    results: Sequence[FamilyResult],
    start: Start,
    settings: SearchSettings,
    reference_model: ReferenceKind,
    *,
    everything: bool,
) -> tuple[tuple[Check, ...], tuple[ReconstructedTrigger, ...]]:
    """Find the smallest triggers of the classes that stand out, and for those that work one for screening.

    Args:
        searches: Runs the searches.
        results: The inspection's results, one per family.
        start: Where to start each search.
        settings: How much work each search does.
        reference_model: Kind of the model that the suspect is compared with.
        everything: Whether to search for the smallest triggers of all classes in all families first. Only those of the
            classes that stand out are used.
    """
    known: dict[tuple[str, int], Reconstruction] = {}
    if everything:
        for item in results:
            starts = {entry.target: start(item.family, entry.target) for entry in item.classes}
            found = searches.reconstruct(item.family, starts, settings, f"{item.family}, reconstruction")
            known.update(((item.family, result.target), result) for result in found)

    def smallest(family: str, target: int) -> Reconstruction:
        if (family, target) in known:
            return known[family, target]
        starts = {target: start(family, target)}
        return searches.reconstruct(family, starts, settings, f"{family}, reconstruction")[0]

    checks: list[Check] = []
    triggers: list[ReconstructedTrigger] = []
    for suspect in (suspects(results, DOUBT) or suspects(results, NOTICED)[:1])[:_MOST_SUSPECTS]:
        target = suspect.target
        working: list[tuple[float, str, Reconstruction]] = []
        for k, (family, p_value) in enumerate(suspect.families):
            if k >= _TRIES and (working or p_value > DOUBT):
                break
            small = smallest(family, target)
            check = _check(small, family, searches.classifier.classes.names[target], reference_model)
            checks.append(check)
            if is_valid(check):
                working.append((check.strength, family, small))
        working.sort(key=lambda item: item[0])
        for strength, family, small in working[:2]:
            if strength <= _AS_NEAR * working[0][0]:
                starts = {target: start(family, target)}
                triggers.append(_strengthened(searches, family, small, starts, suspect.p_value, settings))
    # Triggers that are merely doubtful would cost the screening of a sure verdict some of its sharpness.
    sure = {item.target for item in class_results(results) if is_accused(item, checks)}
    kept = [trigger for trigger in triggers if (trigger.target in sure if sure else trigger.p_value <= DOUBT)]
    return tuple(checks), tuple(sorted(kept, key=lambda trigger: trigger.p_value))


def _check(found: Reconstruction, family: str, name: str, reference_model: ReferenceKind) -> Check:
    return Check(
        family,
        found.target,
        name,
        found.norm,
        RADII[family],
        FAMILIES[family].norm_unit,
        found.reached,
        found.success,
        found.reference_success,
        reference_model,
    )


def _strengthened(
    searches: Searches,
    family: str,
    weak: Reconstruction,
    start: dict[int, Raw],
    p_value: float,
    settings: SearchSettings,
) -> ReconstructedTrigger:
    """Search once more for a trigger that wins as clearly as a genuine image of the class does.

    The smallest trigger is the right one to look at and the wrong one for screening: it barely crosses the decision
    boundary, while the attacker's own trigger goes to the middle of the class.
    """
    strong = replace(settings, success=0.99, margin=1.0, batch=max(64, settings.batch))
    result = searches.reconstruct(family, start, strong, f"{family}, strengthened")[0]
    best = result if result.reached and result.success >= weak.success else weak
    return ReconstructedTrigger(
        f"{family.replace(' ', '-')}-{best.target}",
        best.target,
        best.trigger,
        best.norm,
        best.success,
        p_value,
        searches.target_feature(best.trigger),
    )
