"""One verdict from several vettings of a model that differ in their seed alone. Imports without torch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from guard.errors import UsageError
from guard.vetting.results import Conclusion, Vetting
from guard.vetting.verdict import class_results, is_accused

CONFIRMATIONS = 3
"""Number of vettings, the first included, that must agree where the first one is close to a threshold."""
_GRAVITY: tuple[Conclusion, ...] = ("no evidence", "inconclusive", "backdoored")


def until_they_differ(vettings: Iterable[Vetting]) -> list[Vetting]:
    """Return the vettings up to the first that does not say what those before it say: no further one changes that."""
    said: list[Vetting] = []
    for vetting in vettings:
        said.append(vetting)
        if not _common(said):
            break
    return said


def agreed(vettings: Sequence[Vetting]) -> Vetting:
    """Return the most suspicious of several vettings, with the verdict on which all agree.

    Where they do not say the same of the model, or accuse it for different classes, the verdict is `inconclusive`: what
    depends on the seed is no evidence for either side. A model with two targets is accused for both, and which of them
    stands out more may depend on the seed. Passes and seconds are those of all.

    Args:
        vettings: Of one model, with the same images, reference and budget; at least one.

    Raises:
        UsageError: There is none.
    """
    if not vettings:
        raise UsageError("there is no vetting to agree with; vet the model with at least one seed")
    common = _common(vettings)
    gravest = max(common or vettings, key=lambda each: (_GRAVITY.index(each.verdict.outcome), -each.verdict.p_value))
    verdict = gravest.verdict
    if not common:
        said = Counter((each.verdict.outcome, each.verdict.target) for each in vettings)
        counts = ", ".join(
            f"{outcome}{'' if target is None else f' (class {target})'} by {count}"
            for (outcome, target), count in said.most_common()
        )
        reason = f"{len(vettings)} vettings that differ in their seed alone do not agree: {counts}"
        verdict = replace(verdict, outcome="inconclusive", target=None, reasons=(reason, *verdict.reasons))
    elif len(vettings) > 1:
        verdict = replace(verdict, reasons=(*verdict.reasons, f"{len(vettings)} vettings with different seeds agree"))
    return replace(
        gravest,
        verdict=verdict,
        passes=sum(each.passes for each in vettings),
        seconds=sum(each.seconds for each in vettings),
    )


def _common(vettings: Sequence[Vetting]) -> list[Vetting]:
    """Return those of the vettings that say what all of them say; none where they do not agree.

    Those that accuse agree where there is a class that each of them accuses, and that one of them puts first.
    """
    if len({each.verdict.outcome for each in vettings}) > 1:
        return []
    if vettings[0].verdict.outcome != "backdoored":
        return list(vettings)
    everywhere = set.intersection(*(_accused(each) for each in vettings))
    return [each for each in vettings if each.verdict.target in everywhere]


def _accused(vetting: Vetting) -> set[int | None]:
    """Return the classes that a vetting accuses: that of its verdict, and those whose triggers work in the same way."""
    ranked, verdict = class_results(vetting.results), vetting.verdict
    more = {item.target for item in ranked if is_accused(item, vetting.checks, verdict.significance)}
    return {verdict.target, *more}
