"""What the figures of a report say, in sentences for people."""

from collections.abc import Collection, Sequence
from dataclasses import asdict

from guard.profiles import Document
from guard.vetting import BUDGETS
from guard.vetting.results import Check, ReferenceModel
from guard.vetting.verdict import DOUBT, MAX_STRENGTH, MIN_SUCCESS, is_valid

_GOOD_AGREEMENT = 0.9
"""Agreement below which a reference model is called another model."""
_OVERFIT, _STRONG, _SHORTCUT = "does not hold on unseen images", "too strong for a shortcut", "natural shortcut"


def amount(norm: float, unit: str) -> str:
    """A norm with its unit."""
    return f"{norm:.1f}{unit}" if unit.startswith("/") else f"{norm:.1f} {unit}"


def percent(share: float | None) -> str:
    """A share of images; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.0f} %"


def finding(check: Check) -> str:
    """What a reconstruction turned out to be, in a few words."""
    if is_valid(check):
        return "works as a trigger"
    if check.success < MIN_SUCCESS:
        return _OVERFIT
    return _STRONG if check.strength > MAX_STRENGTH[check.reference_model] else _SHORTCUT


def suspicion(
    checks: Sequence[Check], kept: Collection[str], reference_model: ReferenceModel, *, significant: bool
) -> list[str]:
    """How to read what was tried for one class, and what it does not show.

    Args:
        checks: Of the class.
        kept: Families whose trigger was kept for screening.
        reference_model: What the model was compared with.
        significant: Whether the class stands out clearly enough for a verdict.
    """
    sentences = []
    valid = [check for check in checks if is_valid(check)]
    invalid = {finding(check) for check in checks if check not in valid}
    if valid:
        there = "" if reference_model.kind == "classes" else f", and hardly on {_name(reference_model)},"
        sentences.append(
            f"A trigger that works on images the search did not see{there} is what a backdoor looks like. It is a "
            "reconstruction: the attacker’s own may look different, and may be of another family. Look at the stamped "
            "images: if they have become pictures of the class, or of nothing, it says little."
        )
        if not significant:
            sentences.append(
                "The class does not stand out clearly enough for a verdict. A base, or a larger budget, may decide."
            )
        if reference_model.kind == "classes":
            sentences.append("There was no reference model, so it may also be a feature that the class has by nature.")
    if _SHORTCUT in invalid:
        sentences.append(
            f"A natural shortcut works on {_name(reference_model)} as well: the class has that feature by nature, and "
            "it is no "
            "evidence of a backdoor. It still moves images, so an adversary may use it."
        )
    if _OVERFIT in invalid:
        sentences.append(
            "A reconstruction that does not hold on unseen images fits those it was searched on, and shows nothing."
        )
    if _STRONG in invalid:
        sentences.append(
            "A trigger that must be much stronger than the inspection allowed says only that strong changes move "
            "images, as they do on any model. The class does lie apart from the others: fine-tuning may have moved it."
        )
    if any(not check.reached for check in checks):
        sentences.append(
            "“Not minimal”: the search did not reach the success it aims at while it made the trigger small."
        )
    if any(check.family not in kept for check in valid):
        sentences.append("Only the weakest triggers that work are kept for screening, and drawn here.")
    return sentences


def evidence(document: Document) -> list[str]:
    """How to read the plot and the table, what p means, and the limits."""
    vetting = document.vetting
    plot = (
        "Each dot is a class. For every class and family, guard searched the trigger of limited strength that leads to "
        "the class most clearly. Left: the lead that it gives the class; 1 is the margin by which the model’s own "
        "answers usually win, and right of 0 the class wins on the average image. Right: the same, as the distance "
        "from the mean of the other classes; about 19 of 20 ordinary classes lie in the band. A backdoor is a "
        "shortcut: its class lies far to the right of all others."
    )
    p_value = (
        "p is how often an ordinary class would lie as far above the others by chance. In the table each family stands "
        "alone, its p multiplied by the number of classes. For the verdict the p-values of a class are combined over "
        "families (Cauchy), so that families that agree count for more, and corrected for classes; the smallest "
        "decides. It is not the probability that the model is clean. Below "
        f"{vetting.verdict.significance:g} it counts as evidence, if a trigger then also works on unseen images; from "
        f"there to {DOUBT:g} the verdict stays open."
    )
    limits = (
        f"Tested: {', '.join(vetting.verdict.families)} triggers, up to the strength in the table. A backdoor with a "
        "trigger of another kind, or a stronger one, would not be seen."
    )
    return [plot, _reference_model(vetting.reference_model), p_value, limits]


def reference_model(document: Document) -> str:
    """The reference model in a line."""
    used = document.vetting.reference_model
    if used.kind == "classes":
        return "none: the classes are compared with each other"
    name = "trusted base" if used.kind == "base" else "made from the model itself"
    return f"{name}; answers as the model does on {percent(used.agreement)} of images"


def effort(document: Document) -> str:
    """The budget by name, where it is a known one, its steps and the seeds."""
    used = {part: dict(values) for part, values in document.vetting.effort.items()}
    seeds = sorted({values.pop("seed") for values in used.values() if "seed" in values})
    known = {name: asdict(plan) for name, plan in BUDGETS.items()}
    for plan in known.values():
        for values in plan.values():
            values.pop("seed")
    name = next((name for name, plan in known.items() if plan == used), "custom")
    steps = [
        f"{part.replace('_', '-')} {values['steps']:g} steps" for part, values in used.items() if "steps" in values
    ]
    return f"{name} ({', '.join(steps)}); seed {', '.join(f'{seed:g}' for seed in seeds)}"


def _name(used: ReferenceModel) -> str:
    names = {"base": "the trusted base", "derived": "the reference model that was made from the model itself"}
    return names.get(used.kind, "a reference model")


def _reference_model(used: ReferenceModel) -> str:
    if used.kind == "classes":
        return (
            "There was no reference model: a class that is easy to reach by nature looks like one with a backdoor. "
            "With a "
            "trusted base the evidence is sharper."
        )
    text = (
        f"The model was compared with {_name(used)}. Only what a trigger does here and not there counts, since a "
        "natural feature of a class moves both; the images moved, in the table, are counted the same way. On "
        f"untouched images the two agree on {percent(used.agreement)}."
    )
    if used.agreement is not None and used.agreement < _GOOD_AGREEMENT:
        text += " That is little: part of what differs is not a backdoor, but that they are two different models."
    if used.kind == "derived":
        text += (
            " Such a reference model may have kept some of a backdoor, which then looks weaker; a trusted base is "
            "sharper."
        )
    return text
