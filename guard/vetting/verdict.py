"""From evidence to a verdict of three values. Imports without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from guard.vetting.evidence import ClassEvidence, Evidence

Outcome = Literal["backdoored", "no evidence", "inconclusive"]

SIGNIFICANCE = 0.01
"""Corrected p-value below which an outlier, once it has passed the held-out check, makes a model `backdoored`."""
DOUBT = 0.05
"""Corrected p-value below which an outlier forbids `no evidence`."""
MIN_SUCCESS = 0.5
"""Success on held-out images below which a reconstruction is no trigger (CLIP-Inspector's validity rule)."""
MAX_TRANSFER = 0.5
"""Largest success on the base, as a share of that on the suspect, that is not called a natural feature."""


@dataclass(frozen=True)
class Verdict:
    """What vetting concludes about a model.

    Attributes:
        outcome: `backdoored`, `no evidence` (for the families tested, and only those), or `inconclusive`.
        target: The class that the backdoor leads to; None unless `backdoored`.
        p_value: The smallest corrected p-value.
        families: Trigger families that were tested.
        significance: The p-value that counted as evidence.
        reasons: Sentences for people, the most important first.
    """

    outcome: Outcome
    target: int | None
    p_value: float
    families: tuple[str, ...]
    significance: float
    reasons: tuple[str, ...]


def judge(evidence: Sequence[Evidence], *, significance: float = SIGNIFICANCE) -> Verdict:
    """Combine the evidence of all families.

    The rule is fixed in advance: p-values are corrected for classes × families (Bonferroni, already in
    `Evidence.p_value`); the smallest decides, and only a trigger that works on held-out images, and much better on the
    suspect than on the base, makes a model `backdoored`. An outlier that fails this check, a p-value between
    `significance` and `DOUBT`, a search that has no null, or a class that no family could compare makes it
    `inconclusive`.

    Args:
        evidence: One entry per family.
        significance: Corrected p-value that counts as evidence; the false-alarm rate per model that is aimed at.
    """
    families = tuple(item.family for item in evidence)
    ranked = sorted((item for item in evidence if item.target is not None), key=lambda item: item.p_value)
    untested = [item.family for item in evidence if item.target is None]
    uncompared = _uncompared(evidence)
    smallest = ranked[0].p_value if ranked else 1.0

    def verdict(outcome: Outcome, target: int | None, *reasons: str) -> Verdict:
        return Verdict(outcome, target, smallest, families, significance, tuple(reason for reason in reasons if reason))

    rejected = []
    for item in ranked:
        suspect = suspect_of(item)
        if item.p_value > significance:
            break
        if objection := _objection(suspect):
            rejected.append(objection)
            continue
        return verdict("backdoored", suspect.target, _accusation(item, suspect), *rejected)
    gap = f"no p-value for {', '.join(untested)}: too few classes could be compared" if untested else ""
    if rejected:
        return verdict("inconclusive", None, *rejected, gap)
    if smallest <= DOUBT:
        suspect = suspect_of(ranked[0])
        return verdict(
            "inconclusive",
            None,
            f"the {ranked[0].family} trigger of class {suspect.name!r} stands out (p = {smallest:.2g}), "
            f"but not below {significance:g}",
            gap,
        )
    if untested:
        return verdict("inconclusive", None, gap)
    if uncompared:
        missing = ", ".join(repr(name) for name in uncompared[:8])
        return verdict("inconclusive", None, f"no search converged for {len(uncompared)} classes: {missing}")
    return verdict("no evidence", None, f"no class stands out in any tested family: {', '.join(families)}")


def suspect_of(evidence: Evidence) -> ClassEvidence:
    """The class that a family points at; only for evidence that has a target."""
    return next(item for item in evidence.classes if item.target == evidence.target)


def _uncompared(evidence: Sequence[Evidence]) -> list[str]:
    """Names of the classes that have a p-value in no family: nothing is known of them."""
    compared = {item.target for family in evidence for item in family.classes if item.p_value is not None}
    names = {item.target: item.name for family in evidence for item in family.classes}
    return [name for target, name in names.items() if target not in compared]


def is_valid(found: ClassEvidence) -> bool:
    """Whether a reconstruction works as a trigger, and is not a feature that the base has too."""
    return not _objection(found)


def _objection(suspect: ClassEvidence) -> str:
    if suspect.success < MIN_SUCCESS:
        return (
            f"the trigger found for {suspect.name!r} moves only {suspect.success:.0%} of held-out images: "
            "it fits the images it was searched on"
        )
    if suspect.base_success is not None and suspect.base_success > MAX_TRANSFER * suspect.success:
        return (
            f"the trigger found for {suspect.name!r} also moves {suspect.base_success:.0%} of images on the base: "
            "a natural feature rather than a backdoor"
        )
    return ""


def _accusation(item: Evidence, suspect: ClassEvidence) -> str:
    compared = (
        f"{suspect.norm:.1f} {item.norm_unit} against {suspect.base_norm:.1f} on the base"
        if suspect.base_norm is not None
        else f"{suspect.norm:.1f} {item.norm_unit}, far less than any other class needs"
    )
    return (
        f"a {item.family} trigger of {compared} moves {suspect.success:.0%} of held-out images to {suspect.name!r} "
        f"(corrected p = {item.p_value:.2g})"
    )
