"""One verdict from several vettings of a model that differ in their seed alone. Imports without torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from guard.errors import UsageError
from guard.vetting.results import Conclusion, Vetting

CONFIRMATIONS = 3
"""Number of vettings, the first included, that must agree where the first one is close to a threshold."""
_GRAVITY: tuple[Conclusion, ...] = ("no evidence", "inconclusive", "backdoored")


def agreed(vettings: Sequence[Vetting]) -> Vetting:
    """Return the most suspicious of several vettings, with the verdict on which all agree.

    Where they do not say the same of the model, and of the same class, the verdict is `inconclusive`: what depends on
    the seed is no evidence for either side. Passes and seconds are those of all.

    Args:
        vettings: Of one model, with the same images, reference and budget; at least one.

    Raises:
        UsageError: There is none.
    """
    if not vettings:
        raise UsageError("there is no vetting to agree with; vet the model with at least one seed")
    gravest = max(vettings, key=lambda each: (_GRAVITY.index(each.verdict.outcome), -each.verdict.p_value))
    verdict = gravest.verdict
    said = Counter((each.verdict.outcome, each.verdict.target) for each in vettings)
    if len(said) > 1:
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
