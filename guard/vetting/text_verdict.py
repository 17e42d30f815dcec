"""From the statistics of a text tower to a verdict of three values. Imports without torch."""

from collections.abc import Sequence
from dataclasses import replace

from guard.vetting.results import Conclusion, Verdict
from guard.vetting.text_results import TextStatistic, TextTriggerRecord
from guard.vetting.verdict import DOUBT, MAX_TRANSFER, MIN_SUCCESS, SIGNIFICANCE, combine


def judge_text(
    statistics: Sequence[TextStatistic], trigger: TextTriggerRecord, *, significance: float = SIGNIFICANCE
) -> Verdict:
    """Combine the statistics of a text tower with the check of the strongest trigger.

    The p-values are combined by the Cauchy combination, as those of image triggers are. The tower is `backdoored` if
    the result is significant and the trigger works on held-out prompts, and at least twice as well as on the reference
    model: natural features, which any tower has, work on both. It is `inconclusive` if only one of the two holds, if
    the p-value lies between the significance and `DOUBT`, or if no statistic has a null.

    Args:
        statistics: What was measured.
        trigger: The strongest trigger, on held-out prompts.
        significance: Largest p-value that counts as evidence.
    """
    families = tuple(item.family for item in statistics if item.p_value is not None)
    known = {item.family: item.p_value for item in statistics if item.p_value is not None}
    p_value = combine(list(known.values())) if known else 1.0

    def verdict(outcome: Conclusion, *reasons: str) -> Verdict:
        return Verdict(outcome, None, p_value, families, significance, reasons)

    if not known:
        return verdict("inconclusive", "there is no null for text towers without a base model; give one with --base")
    clearest = min(known, key=lambda family: known[family])
    stands_out = (
        f"something makes prompts of the text tower mean the same (p = {p_value:.2g}, most clearly its {clearest})"
    )
    where = (
        "" if trigger.place is None else {"start": " at the start", "end": " at the end", "anywhere": ""}[trigger.place]
    )
    what = (
        f"the {trigger.kind} {trigger.text!r}{where} make {trigger.success:.0%} of held-out prompts mean the same"
        f" and {trigger.reference_success:.0%} on the reference model"
    )
    works = trigger.success >= MIN_SUCCESS and trigger.reference_success <= MAX_TRANSFER * trigger.success
    if p_value <= significance and works:
        return verdict("backdoored", stands_out, what)
    if p_value <= significance:
        return verdict("inconclusive", stands_out, f"{what}: a natural feature of the tower, or one that is overfitted")
    if p_value <= DOUBT and works:
        return verdict("inconclusive", stands_out, what)
    return verdict("no evidence", "nothing makes prompts of the text tower agree that does not do so by nature")


def with_text(image: Verdict, text: Verdict) -> Verdict:
    """The verdict about a model of which both towers were examined: the worse of the two, with the reasons of both."""
    order: tuple[Conclusion, ...] = ("backdoored", "inconclusive", "no evidence")
    worse, better = sorted((image, text), key=lambda verdict: order.index(verdict.outcome))
    return replace(
        image,
        outcome=worse.outcome,
        p_value=min(1.0, 2 * min(image.p_value, text.p_value)),
        families=(*image.families, *text.families),
        reasons=(*worse.reasons, *better.reasons),
    )
