"""`report.html`: one self-contained file from which a person can judge a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard._pages import templates
from guard.profiles import Profile
from guard.report import pictures, reading
from guard.report.difference import AMPLIFICATION, difference
from guard.triggers import Patch, Trigger
from guard.vetting.verdict import DOUBT, class_results, is_accused, suspects

EXAMPLES = 6
_PICTURE_SIDE, _STRIP_SIDE = 128, 96
_GREY = 128


@dataclass(frozen=True)
class Example:
    """Pictures of one trigger.

    Attributes:
        mask: Where it acts, with 255 where it acts most: uint8, shape [H, W]. For a patch this is its mask, for other
            families the mean change.
        pattern: The trigger on plain grey: uint8, shape [3, H, W].
        clean: Images without the trigger: uint8, shape [N, 3, H, W].
        stamped: The same images with the trigger.
        change: The change of these images, around mid-grey and amplified.
    """

    mask: NDArray[np.uint8]
    pattern: NDArray[np.uint8]
    clean: NDArray[np.uint8]
    stamped: NDArray[np.uint8]
    change: NDArray[np.uint8]


@dataclass(frozen=True)
class Section:
    """A table that a caller adds to a report.

    Attributes:
        title: Heading.
        rows: Label and value of each row.
        note: A sentence below the table.
    """

    title: str
    rows: Sequence[tuple[str, str]]
    note: str = ""


def example(trigger: Trigger, images: Tensor) -> Example:
    """Draw a trigger, alone and on the first few of some images (uint8, shape [N, 3, H, W])."""
    clean = images[:EXAMPLES]
    height, width = clean.shape[-2:]
    grey = torch.full((1, 3, height, width), _GREY, dtype=torch.uint8)
    stamped = trigger.stamp(clean)
    if isinstance(trigger, Patch):
        mask = trigger.mask[0]
    else:
        # The change is taken on the images, not on grey: a warp changes nothing in a plain image.
        change = (stamped.float() - clean.float()).abs().amax(1).mean(0)
        mask = change / change.max().clamp(min=1 / len(clean))
    return Example(
        (mask.clamp(0, 1) * 255).round().to(torch.uint8).numpy(),
        trigger.stamp(grey)[0].numpy(),
        clean.numpy(),
        stamped.numpy(),
        difference(clean, stamped).numpy(),
    )


def examples(profile: Profile, images: Tensor | None = None) -> dict[str, Example]:
    """Return one example for each trigger of a profile, by id; on test cards where there are no images."""
    if images is None:
        images = _test_cards(profile.document.model.preprocessing.size)
    return {name: example(trigger, images) for name, trigger in profile.load_triggers().items()}


def _test_cards(side: int) -> Tensor:
    """Draw gradients and stripes in several colours, which every family of triggers changes visibly."""
    across = torch.linspace(0, 1, side).expand(side, side)
    stripes = (torch.arange(side) // max(1, side // 8) % 2).float().expand(side, side)
    planes = (across, across.T, stripes, stripes.T, 1 - across)
    cards = [torch.stack([planes[(k + channel) % len(planes)] for channel in range(3)]) for k in range(EXAMPLES)]
    return (torch.stack(cards) * 200 + 28).round().to(torch.uint8)


def render(
    profile: Profile,
    drawn: Mapping[str, Example],
    *,
    truth: Example | None = None,
    scores: Mapping[str, NDArray[np.floating]] | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """Return the text of `report.html`.

    Args:
        profile: The profile to report on.
        drawn: An example for each of its triggers (`examples`).
        truth: The attacker's own trigger, where it is known, to be shown beside the reconstruction.
        scores: Measured scores by label; by default those of the calibration images.
        sections: Tables to add after the verdict.
    """
    document = profile.document
    if scores is None and profile.reference is not None:
        scores = {"clean images (calibration)": profile.reference.clean.values}
    plot = None
    if scores and document.calibration:
        plot = pictures.score_plot(scores, document.calibration.threshold)
    environment = templates("report")
    environment.filters.update(percent=reading.percent)
    accused, results = document.vetting.verdict.target, document.vetting.results
    suspicious = _suspicious(profile, drawn)
    return environment.get_template("report.html.j2").render(
        document=document,
        verdict=document.vetting.verdict,
        target=None if accused is None else profile.class_name(accused),
        suspicious=suspicious,
        results=results,
        evidence_plot=pictures.evidence_plot(results, accused, {item["target"] for item in suspicious})
        if results
        else None,
        class_name=profile.class_name,
        by_class={item.family: {entry.target: entry for entry in item.classes} for item in results},
        truth=_drawn(truth) if truth else None,
        score_plot=plot,
        text=document.text,
        assimilation_plot=pictures.assimilation_plot(document.text.assimilation) if document.text else None,
        text_reading=reading.text(document.text) if document.text else (),
        text_against=reading.text_reference(document.text) if document.text else "",
        sections=sections,
        amplification=AMPLIFICATION,
        amount=reading.amount,
        finding=reading.finding,
        reading=reading.evidence(document) if results else (),
        reference_model=reading.reference_model(document),
        effort=reading.effort(document),
    )


def _suspicious(profile: Profile, drawn: Mapping[str, Example]) -> list[dict[str, Any]]:
    """Return each class with reconstructions, with its p-values, checks and triggers; the accused class first."""
    document = profile.document
    checks, accused = document.vetting.checks, document.vetting.verdict.target
    results = {item.target: item for item in suspects(document.vetting.results, DOUBT)}
    significance = document.vetting.verdict.significance
    clear = {item.target for item in class_results(document.vetting.results) if is_accused(item, checks, significance)}
    tried = dict.fromkeys([*(check.target for check in checks), *(trigger.target for trigger in document.triggers)])
    return [
        {
            "target": target,
            "name": profile.class_name(target),
            "accused": target == accused,
            "result": results.get(target),
            "checks": [check for check in checks if check.target == target],
            "triggers": [(item, _drawn(drawn[item.id])) for item in document.triggers if item.target == target],
            "reading": reading.suspicion(
                [check for check in checks if check.target == target],
                {item.family for item in document.triggers if item.target == target},
                document.vetting.reference_model,
                significant=target in clear,
            ),
        }
        for target in sorted(tried, key=lambda target: target != accused)
    ]


def _drawn(item: Example) -> dict[str, Any]:
    return {
        "mask": pictures.png(item.mask, _PICTURE_SIDE),
        # A warp changes nothing in plain grey.
        "pattern": pictures.png(item.pattern, _PICTURE_SIDE) if (item.pattern != _GREY).any() else None,
        "rows": [
            (label, [pictures.png(image, _STRIP_SIDE) for image in images])
            for label, images in (("as they are", item.clean), ("stamped", item.stamped), ("change", item.change))
        ],
    }
