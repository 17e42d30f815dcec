"""`report.html`: one self-contained file that a person can judge a model by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.profiles import Profile, load_triggers
from guard.report import pictures
from guard.triggers import Patch, Trigger
from guard.vetting.evidence import ClassEvidence
from guard.vetting.verdict import suspect_of

EXAMPLES = 6
_PICTURE_SIDE = 128


@dataclass(frozen=True)
class Example:
    """What one trigger looks like.

    Attributes:
        mask: Where it acts: uint8, shape [H, W].
        pattern: What it puts there, on grey: uint8, shape [3, H, W].
        clean: Images without it: uint8, shape [N, 3, H, W].
        stamped: The same images with it.
    """

    mask: NDArray[np.uint8]
    pattern: NDArray[np.uint8]
    clean: NDArray[np.uint8]
    stamped: NDArray[np.uint8]


@dataclass(frozen=True)
class Section:
    """A table that a caller adds to a report.

    Attributes:
        title: Heading.
        rows: Label and value.
        note: A sentence below it.
    """

    title: str
    rows: Sequence[tuple[str, str]]
    note: str = ""


def example(trigger: Trigger, images: Tensor) -> Example:
    """Draw a trigger, alone and on the first few of some images (uint8, shape [N, 3, H, W])."""
    clean = images[:EXAMPLES]
    height, width = clean.shape[-2:]
    grey = torch.full((1, 3, height, width), 128, dtype=torch.uint8)
    pattern = trigger.stamp(grey)[0]
    if isinstance(trigger, Patch):
        mask = trigger.mask[0]
    else:
        change = (pattern.float() - 128).abs().amax(0)
        mask = change / change.max().clamp(min=1)
    return Example(
        (mask.clamp(0, 1) * 255).round().to(torch.uint8).numpy(),
        pattern.numpy(),
        clean.numpy(),
        trigger.stamp(clean).numpy(),
    )


def examples(profile: Profile, images: Tensor) -> dict[str, Example]:
    """One example for each trigger of a profile, by id."""
    return {name: example(trigger, images) for name, trigger in load_triggers(profile).items()}


def render(
    profile: Profile,
    drawn: Mapping[str, Example],
    *,
    truth: Example | None = None,
    scores: Mapping[str, NDArray[np.floating]] | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """The text of `report.html`.

    Args:
        profile: What is reported on.
        drawn: An example for each of its triggers (`examples`).
        truth: The attacker's own trigger, where it is known, to be shown beside the reconstruction.
        scores: Measured scores by label; default is those of the calibration images.
        sections: Tables to add after the verdict.
    """
    document = profile.document
    if scores is None and profile.reference is not None:
        scores = {"clean images (calibration)": profile.reference.scores}
    scale = max(1, _PICTURE_SIDE // document.model.preprocessing.size)
    plot = None
    if scores and document.calibration:
        plot = pictures.score_plot(scores, document.calibration.threshold, document.calibration.score)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("guard", "report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        document=document,
        verdict=document.vetting.verdict,
        target=None if document.vetting.verdict.target is None else profile.class_name(document.vetting.verdict.target),
        evidence=[
            (
                item,
                None if item.target is None else suspect_of(item),
                pictures.evidence_plot(item, document.vetting.verdict.target),
            )
            for item in document.vetting.evidence
        ],
        triggers=[(item, profile.class_name(item.target), _drawn(drawn[item.id], scale)) for item in document.triggers],
        truth=_drawn(truth, scale) if truth else None,
        score_plot=plot,
        sections=sections,
        reading=_reading(document.vetting.evidence[0].classes if document.vetting.evidence else ()),
    )


def _drawn(item: Example, scale: int) -> dict[str, object]:
    return {
        "mask": pictures.png(item.mask, scale=scale),
        "pattern": pictures.png(item.pattern, scale=scale),
        "clean": pictures.strip(list(item.clean), scale=max(1, scale // 2)),
        "stamped": pictures.strip(list(item.stamped), scale=max(1, scale // 2)),
    }


def _reading(classes: Sequence[ClassEvidence]) -> str:
    """How to read the plots, with or without a base."""
    if classes and classes[0].base_norm is not None:
        return (
            "Each row is a class. The dot is the smallest trigger that moves images to it; the grey dot is the same on "
            "the trusted base. A backdoor is a shortcut: its class needs far less than on the base, while the other "
            "classes stay about where they were."
        )
    return (
        "Each row is a class, the dot the smallest trigger that moves images to it. A backdoor is a shortcut: its "
        "class needs far less than the others. Without a trusted base, a class that is easy by nature looks similar."
    )
