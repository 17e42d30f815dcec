"""Reconstruct the triggers of the classes that stand out, and check them on held-out images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from guard.triggers import FAMILIES, Additive, Raw
from guard.vetting.budgets import SearchSettings
from guard.vetting.inspection import RADII
from guard.vetting.inversion import Reconstruction
from guard.vetting.probes import Probe
from guard.vetting.race import RACED_CLASSES, distinct_classes, resembling
from guard.vetting.results import PROBES, Check, FamilyResult, ReconstructedTrigger, ReferenceKind
from guard.vetting.searches import Searches
from guard.vetting.verdict import DOUBT, NOTICED, ClassResult, class_results, is_accused, is_valid, suspects

_MOST_SUSPECTS = 4
"""Largest number of classes for which triggers are reconstructed."""
_TRIES = 3
"""Number of families in which a suspect's trigger is reconstructed: those in which it stands out most. For the most
suspicious class, where its p-value is at most `DOUBT`, more are tried until one passes its check. Each try costs as
much as the inspection of several classes."""
_STANDS_OUT = 0.05
"""Largest p-value of a class in one family, uncorrected, with which its trigger of that family is evidence. A trigger
that works says nothing where the class does not stand out: so does many a natural feature. A probe has no strength that
could be limited, so that its class must stand out under probes with the correction for the number of classes. Of the
zoo `small` of seed 100, four clean models were accused before, with a base, of which three stood out under other
families, whose triggers failed, while a sinusoid moved 58 and 72 % of images to the class."""
_NEAR = 0.5
"""Mean distance from a class (`Lead.distance`) up to which a trigger is searched for the images of a third of the
classes alone. An image without a trigger is about 1 away. Of the sources of three source-specific attacks it was -0.3
to 0.0 with a base; on 12 clean models 0.4 and more, on most 0.8."""
_SOME_TRIES = 4
"""Number of families in which that is done: those under which these images come nearest."""
_AS_NEAR = 2.0
"""A class's second trigger is kept for screening if it is at most so many times as strong as its first, each relative
to the radius of its family. The family that needs the least is nearest to the attacker's own; one that only gets there
by force stamps the bank with something else, and blurs the match."""

_FROM_PROBES = Additive.family
"""Family in which a trigger is searched from what a probe adds on the average, where a probe works and no trigger."""

Start = Callable[[str, int], Raw]
"""From a family and a class index to the unconstrained parameters with which their inspection ended."""


def reconstruct_suspects(
    searches: Searches,
    results: Sequence[FamilyResult],
    start: Start,
    probe_of: Callable[[int], Probe],
    settings: SearchSettings,
    reference_model: ReferenceKind,
    *,
    everything: bool,
) -> tuple[tuple[Check, ...], tuple[ReconstructedTrigger, ...]]:
    """Find the smallest triggers of the classes that stand out, and for those that work one for screening.

    Where no trigger accuses a class, one that need not work on the images of all other classes is tried.

    Args:
        searches: Runs the searches.
        results: The inspection's results, one per family, and that of the probes.
        start: Where to start each search.
        probe_of: From a class index to the probe that it gains most under.
        settings: How much work each search does.
        reference_model: Kind of the model that the suspect is compared with.
        everything: Whether to search for the smallest triggers of all classes in all families first. Only those of the
            classes that stand out are used.
    """
    known: dict[tuple[str, int], Reconstruction] = {}
    if everything:
        for item in results:
            if item.family == PROBES:
                continue
            starts = {entry.target: start(item.family, entry.target) for entry in item.classes}
            found = searches.reconstruct(item.family, starts, settings, f"{item.family}, reconstruction")
            known.update(((item.family, result.target), result) for result in found)

    names = searches.classifier.classes.names
    checks: list[Check] = []

    def attempt(family: str, target: int, raw: Raw | None = None, sources: tuple[int, ...] = ()) -> list[_Working]:
        """Search for the smallest trigger and check it; return it if it works."""
        begun = start(family, target) if raw is None else raw
        small = known.get((family, target)) if raw is None and not sources else None
        if small is None:
            what = f"{family}, reconstruction"
            small = searches.reconstruct(family, {target: begun}, settings, what, sources)[0]
        check = _check(small, family, names[target], reference_model)
        checks.append(replace(check, sources=tuple(names[k] for k in sources)))
        return [_Working(checks[-1].strength, family, small, begun, sources)] if is_valid(checks[-1]) else []

    def attempt_on_some(suspect: ClassResult) -> list[_Working]:
        """Search for the smallest triggers for the images that come nearest; return those that work."""
        searched = [family for family, _ in suspect.families if family != PROBES]
        near = {
            family: searches.nearest_sources(family, suspect.target, start(family, suspect.target))
            for family in searched
        }
        found: list[_Working] = []
        for family in sorted(searched, key=lambda each: near[each][0])[:_SOME_TRIES]:
            distance, sources = near[family]
            if distance > _NEAR or is_accused(suspect, checks):
                break
            found += attempt(family, suspect.target, sources=sources)
        return found

    # Among many classes those that resemble the target stand out behind it: that one is enough.
    many = not everything and len(distinct_classes(searches.classifier)) > RACED_CLASSES
    correction = max((item.corrected_for or len(item.classes) for item in results if item.family == PROBES), default=1)
    explained: list[int] = []
    triggers: list[ReconstructedTrigger] = []
    noticed = suspects(results, NOTICED)[:_MOST_SUSPECTS]
    for place, suspect in enumerate(noticed):
        target = suspect.target
        if many and resembling(searches.classifier, target)[explained].any():
            continue
        working: list[_Working] = []
        doubtful = place == 0 or suspect.p_value <= DOUBT
        inspected = [(family, p_value) for family, p_value in suspect.families if family != PROBES and doubtful]
        for k, (family, p_value) in enumerate(inspected):
            if p_value > _STANDS_OUT or (k >= _TRIES and (working or place > 0 or suspect.p_value > DOUBT)):
                break
            working += attempt(family, target)
        if doubtful and dict(suspect.families).get(PROBES, 1.0) * correction <= _STANDS_OUT:
            probe = probe_of(target)
            checks.append(_probe_check(searches, probe, target, reference_model))
            if is_valid(checks[-1]) and not working and _FROM_PROBES in {item.family for item in results}:
                working += attempt(_FROM_PROBES, target, Additive.unconstrained(searches.mean_change(probe)))
        if not any(is_accused(item, checks) for item in noticed):
            working += attempt_on_some(suspect)
        working.sort(key=lambda each: each.strength)
        if working:
            explained.append(target)
        triggers += [
            _strengthened(searches, each, suspect.p_value, settings)
            for each in working[:2]
            if each.strength <= _AS_NEAR * working[0].strength
        ]
    # Triggers that are merely doubtful would cost the screening of a sure verdict some of its sharpness.
    sure = {item.target for item in class_results(results) if is_accused(item, checks)}
    kept = [trigger for trigger in triggers if (trigger.target in sure if sure else trigger.p_value <= DOUBT)]
    return tuple(checks), tuple(sorted(kept, key=lambda trigger: trigger.p_value))


@dataclass(frozen=True, eq=False)
class _Working:
    """A smallest trigger that passed its check, with the parameters that its search started from."""

    strength: float
    family: str
    smallest: Reconstruction
    start: Raw
    sources: tuple[int, ...]


def _probe_check(searches: Searches, probe: Probe, target: int, reference_model: ReferenceKind) -> Check:
    success, there = searches.probe_effects(probe, target)
    return Check(
        PROBES,
        target,
        searches.classifier.classes.names[target],
        1.0,
        1.0,
        "listed change",
        reached=True,
        success=success,
        reference_success=there,
        reference_model=reference_model,
        probe=probe.name,
    )


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
    searches: Searches, working: _Working, p_value: float, settings: SearchSettings
) -> ReconstructedTrigger:
    """Search once more for a trigger that wins as clearly as a genuine image of the class does.

    The smallest trigger is the right one to look at and the wrong one for screening: it barely crosses the decision
    boundary, while the attacker's own trigger goes to the middle of the class.
    """
    strong = replace(settings, success=0.99, margin=1.0, batch=max(64, settings.batch))
    family, weak = working.family, working.smallest
    what = f"{family}, strengthened"
    result = searches.reconstruct(family, {weak.target: working.start}, strong, what, working.sources)[0]
    best = result if result.reached and result.success >= weak.success else weak
    return ReconstructedTrigger(
        f"{family.replace(' ', '-')}-{best.target}",
        best.target,
        best.trigger,
        best.norm,
        best.success,
        p_value,
        searches.target_feature(best.trigger, working.sources),
    )
