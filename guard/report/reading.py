"""Sentences of a report that explain its figures."""

from collections.abc import Collection, Sequence

from guard.profiles import Document
from guard.vetting.budgets import name_of
from guard.vetting.results import Check, Difference, ReferenceModel
from guard.vetting.text_results import TextVetting
from guard.vetting.verdict import DOUBT, EASE, MAX_STRENGTH, MIN_SUCCESS, is_valid

_GOOD_AGREEMENT = 0.9
"""Agreement below which the report warns that suspect and reference model are two different models."""
_OVERFIT, _STRONG, _SHORTCUT = "does not work on held-out images", "too strong for a shortcut", "natural shortcut"


def amount(norm: float, unit: str) -> str:
    """Return a norm with its unit."""
    return f"{norm:.1f}{unit}" if unit.startswith("/") else f"{norm:.1f} {unit}"


def percent(share: float | None) -> str:
    """Return a share of images in percent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.0f} %"


def finding(check: Check) -> str:
    """Return the result of a check, in a few words."""
    if is_valid(check):
        return "works as a trigger"
    if check.success < MIN_SUCCESS:
        return _OVERFIT
    return _STRONG if check.strength > MAX_STRENGTH[check.reference_model] else _SHORTCUT


def suspicion(
    checks: Sequence[Check], kept: Collection[str], reference_model: ReferenceModel, *, significant: bool
) -> list[str]:
    """Explain the checks of one class, and what they do not show.

    Args:
        checks: The checks of the class.
        kept: Families whose trigger was kept for screening.
        reference_model: The model that the suspect was compared with.
        significant: Whether the class stands out clearly enough for a verdict.
    """
    sentences = []
    valid = [check for check in checks if is_valid(check)]
    invalid = {finding(check) for check in checks if check not in valid}
    if valid:
        there = "" if reference_model.kind == "classes" else f", and hardly works on {_name(reference_model)},"
        sentences.append(
            f"A trigger that works on images that the search did not use{there} is what a backdoor looks like. It is a "
            "reconstruction: the attacker’s own trigger may look different, and may be of another family. Look at the "
            "stamped images: if they have become pictures of the class, or if nothing can be recognised in them, the "
            "trigger says little."
        )
        if not significant:
            sentences.append(
                "The class does not stand out clearly enough for a verdict with a trigger of this size. A base model, "
                "or a larger budget, may decide."
            )
        if reference_model.kind == "classes":
            sentences.append("There was no reference model, so the trigger may also be a natural feature of the class.")
    if _SHORTCUT in invalid:
        sentences.append(
            f"A natural shortcut works on {_name(reference_model)} as well: it is a natural feature of the class, and "
            "not evidence of a backdoor. It still moves images, so an adversary may use it."
        )
    if _OVERFIT in invalid:
        sentences.append(
            "A reconstruction that does not work on held-out images is overfitted to the images that it was searched "
            "on, and shows nothing."
        )
    if _STRONG in invalid:
        sentences.append(
            "A trigger that must be much stronger than the inspection allowed shows only that strong changes move "
            "images, as they do on any model. The class still differs from the others: fine-tuning may have moved it."
        )
    if any(check.sources for check in checks):
        sentences.append(
            "Where classes are named beside a trigger, it was searched for, and tried on, their images only. "
            "An attacker’s trigger may work on some classes and on no others. To count it must be half as strong as "
            "another, since the images of few classes are easier to move than those of all."
        )
    if any(not check.reached for check in checks):
        sentences.append(
            "“Not minimal” means that the search did not reach the success rate it aims at while it minimised the "
            "trigger."
        )
    if any(check.family not in kept for check in valid):
        sentences.append("Only the weakest triggers that work are kept for screening and drawn here.")
    return sentences


def evidence(document: Document) -> list[str]:
    """Explain the plot and the table, what p means, and the limits."""
    vetting = document.vetting
    plot = (
        "Each dot is a class. For every class and family, guard searched for the trigger of limited strength that "
        "leads to the class most clearly. The left plot shows the lead that this trigger gives the class: 1 is the "
        "margin by which the model’s own answers usually win, and to the right of 0 the class wins on the average "
        "image. The right plot shows the distance of this lead from the mean of the other classes; about 19 of 20 "
        "ordinary classes lie within the band. A backdoor is a shortcut: its class lies far to the right of all "
        "others."
    )
    p_value = (
        "The p-value tells how often an ordinary class would lie as far above the others by chance. In the table each "
        "family is judged alone, and its p-value is multiplied by the number of classes. For the verdict the p-values "
        "of a class are combined over families (Cauchy), so that families that agree count more, and are corrected "
        "for the number of classes; the smallest decides. It is not the probability that the model is clean. At most "
        f"{vetting.verdict.significance:g} counts as evidence, if a trigger also works on held-out images, and is the "
        "smaller the larger the p-value is; a very small trigger is enough up to "
        f"{EASE * vetting.verdict.significance:g}. Otherwise the verdict stays open up to {DOUBT:g}."
    )
    limits = (
        f"The families {', '.join(vetting.verdict.families)} were tested, up to the strength in the table. A backdoor "
        "with a trigger of another family, or with a stronger trigger, would not be found."
    )
    return [plot, _reference_model(vetting.reference_model), p_value, limits]


def text(found: TextVetting) -> list[str]:
    """Explain the figures of the text tower."""
    against = text_reference(found)
    leads = (
        f"guard looked for something that makes all prompts mean the same on this text tower and not on {against}, and "
        "names no target: listed texts, pseudo-tokens (vectors in place of tokens), and real tokens near them. A lead "
        "is the agreement that prompts gain on the suspect, less what they gain on the reference model; 1 is all that "
        "is possible. “Swapped” is the same with the two exchanged: honest fine-tuning changes a tower both ways, a "
        "trigger is there on one side only, and so the difference of the two counts."
    )
    alike = (
        "The embeddings of ordinary prompts without a trigger have a mean cosine of "
        f"{found.reference_model.agreement or 0:.2f} with those of the reference model. Assimilation is the mean "
        "cosine between the tokens of a prompt; an attack on the last token alone does not raise it. A dynamic trigger "
        "(a style, an order of words) is no token, and may not be found."
    )
    return [leads, alike]


def text_reference(found: TextVetting) -> str:
    """Name the model that a text tower was compared with."""
    return "the trusted base model" if found.reference_model.kind == "base" else "a model made from the suspect itself"


def reference_model(document: Document) -> str:
    """Describe the reference model in one line."""
    used = document.vetting.reference_model
    if used.kind == "classes":
        return "none; the classes are compared with each other"
    names = {"base": "trusted base model", "towers": "prompts tuned anew on trusted towers"}
    name = names.get(used.kind, "derived from the model itself")
    weights = "" if used.difference is None else f"; the weights differ by {_weights(used.difference)}"
    return f"{name}; gives the same answer as the model on {percent(used.agreement)} of images{weights}"


def _weights(found: Difference) -> str:
    return f"{percent(found.size)}, {found.looks} (flatness {found.flatness:.2f}; noise has 1)"


def effort(document: Document) -> str:
    """Return the name of the budget, its steps and the seeds."""
    used = {part: dict(values) for part, values in document.vetting.effort.items()}
    seeds = sorted({values.pop("seed") for values in used.values() if "seed" in values})
    name = name_of(used) or "custom"
    steps = [
        f"{part.replace('_', '-')} {values['steps']:g} steps" for part, values in used.items() if "steps" in values
    ]
    return f"{name} ({', '.join(steps)}); seed {', '.join(f'{seed:g}' for seed in seeds)}"


def _name(used: ReferenceModel) -> str:
    names = {
        "base": "the trusted base model",
        "towers": "prompts that were tuned anew on trusted towers",
        "derived": "the reference model that was derived from the model itself",
    }
    return names.get(used.kind, "a reference model")


def _reference_model(used: ReferenceModel) -> str:
    if used.kind == "classes":
        return (
            "There was no reference model, so a class that is naturally easy to reach looks like one with a backdoor. "
            "With a trusted base model the evidence is sharper."
        )
    text = (
        f"The model was compared with {_name(used)}. Only the effect that a trigger has on the model and not on the "
        "reference model counts, since a natural feature of a class moves both; the column of images moved is counted "
        f"in the same way. The two models give the same answer on {percent(used.agreement)} of images without a "
        "trigger."
    )
    if used.agreement is not None and used.agreement < _GOOD_AGREEMENT:
        text += (
            " That is little: part of the difference between them may come from their being two different models, and "
            "not from a backdoor."
        )
    if used.kind == "derived":
        text += (
            " Such a reference model may have kept part of a backdoor, which then looks weaker; with a trusted base "
            "model the evidence is sharper."
        )
    return text
