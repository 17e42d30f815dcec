"""From vetting to a profile, and from images to its banks and threshold."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor

from guard import __version__
from guard.classifiers.classifier import Classifier
from guard.errors import ImageError, ProfileError
from guard.profiles.profile import (
    SCHEMA,
    CalibrationRecord,
    Document,
    ModelRecord,
    Profile,
    Reference,
    TriggerRecord,
    VettingRecord,
)
from guard.profiles.vocabulary import nearest
from guard.screening import Screen, default_k, threshold
from guard.triggers import FAMILIES, Trigger
from guard.vetting.examination import Vetting

REFERENCE_SHARE, CALIBRATION_SHARE = 0.4, 0.4
"""Shares of the images that go into the banks and behind the threshold; on the rest the false alarms are counted."""


def build(classifier: Classifier, vetting: Vetting, *, vocabulary: Sequence[str] = ()) -> Profile:
    """The profile of a classifier that was just examined; not yet calibrated.

    Args:
        classifier: The suspect.
        vetting: Of this classifier.
        vocabulary: Texts, besides the class names, that may name a trigger's target feature.
    """
    model = ModelRecord(
        classifier.source,
        classifier.digest.root,
        classifier.digest.parts,
        classifier.classes,
        classifier.preprocessing,
        classifier.head.shape[-1],
    )
    record = VettingRecord(
        vetting.verdict,
        vetting.evidence,
        vetting.checks,
        asdict(vetting.effort),
        vetting.images,
        vetting.control,
        vetting.device,
        vetting.seconds,
        vetting.passes,
    )
    named = nearest(classifier, [found.feature for found in vetting.triggers], vocabulary)
    triggers = tuple(
        TriggerRecord(
            found.id,
            found.trigger.family,
            found.target,
            found.norm,
            found.trigger.norm_unit,
            found.success,
            found.p_value,
            near,
        )
        for found, near in zip(vetting.triggers, named, strict=True)
    )
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    document = Document(SCHEMA, __version__, created, model, record, triggers, None, {})
    tensors = {
        found.id: {name: tensor.float().numpy() for name, tensor in found.trigger.tensors().items()}
        for found in vetting.triggers
    }
    return Profile(document, tensors)


def load_triggers(profile: Profile) -> dict[str, Trigger]:
    """The reconstructed triggers of a profile as transformations, by id.

    Raises:
        ProfileError: A trigger is of a family that this guard does not know, or its tensors make none of that family.
    """
    triggers: dict[str, Trigger] = {}
    for record in profile.document.triggers:
        if record.family not in FAMILIES:
            raise ProfileError(
                f"the trigger {record.id!r} is of the family {record.family!r}, which this guard does not know; "
                "use the newer guard that wrote the profile"
            )
        tensors = {name: torch.from_numpy(values.copy()) for name, values in profile.triggers[record.id].items()}
        try:
            triggers[record.id] = FAMILIES[record.family].from_tensors(tensors)
        except ValueError as error:
            raise ProfileError(
                f"the profile is damaged: the trigger {record.id!r} is no {record.family}: {error}"
            ) from error
    return triggers


def calibrate(
    profile: Profile,
    classifier: Classifier,
    images: Tensor,
    alpha: float,
    *,
    k: int | None = None,
    groups: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Build reference and stamped banks and set the threshold.

    The images are split at random: 40 % into the banks, 40 % behind the threshold, and on the last 20 % the false
    alarms are counted. They must be clean, of the kind that the deployment will see, and not ones that the model was
    trained on: a model knows its training images better, and the threshold would be too low.

    Args:
        profile: Of this classifier.
        classifier: Computes the embeddings.
        images: uint8, shape [N, 3, H, W], at the classifier's resolution.
        alpha: False-alarm rate that the operator accepts, in (0, 1).
        k: Neighbour that distances are taken to; default is `default_k`.
        groups: int64, shape [N]: images of one group, such as the frames of one film, stay on one side of the split.
            A near-duplicate in the bank makes an image look more ordinary than any request will, so that a split
            through groups sets the threshold too low. Default: each image is a group.
        seed: Of the split.
        progress: Told what is being embedded.

    Returns:
        The profile with its reference; an older one is replaced.

    Raises:
        ProfileError: The profile is of another classifier.
        ImageError: There are too few images for banks of k.
        UsageError: There are too few images for this alpha.
    """
    profile.check_model(classifier.digest)
    order, banks, behind = _split(torch.arange(len(images)) if groups is None else groups, seed)
    if k is None:
        k = default_k(banks, len(classifier.classes.names))
    if banks <= k:
        raise ImageError(
            f"banks with k = {k} need more than {round(k / REFERENCE_SHARE)} images, there are {len(images)}"
        )
    progress(f"embedding {len(images)} images")
    embeddings = classifier.embed(images).numpy()
    clean, calibration, held_out = np.split(embeddings[order.numpy()], [banks, banks + behind])
    stamped = {}
    for name, trigger in load_triggers(profile).items():
        progress(f"embedding {banks} images with the trigger {name}")
        stamped[name] = classifier.embed(trigger.stamp(images[order[:banks]])).numpy()
    screen = Screen(clean, stamped, k=k)
    scores = screen.score_samples(calibration).values
    chosen = threshold(scores, alpha)
    alarms = int((screen.score_samples(held_out).values > chosen.value).sum()) if len(held_out) else 0
    record = CalibrationRecord(screen.score, k, chosen, banks, len(held_out), alarms, seed)
    return replace(
        profile,
        document=replace(profile.document, calibration=record),
        reference=Reference(np.ascontiguousarray(clean), stamped, scores),
    )


def _split(groups: Tensor, seed: int) -> tuple[Tensor, int, int]:
    """An order of the images, how many of them go into the banks, and how many of the next behind the threshold."""
    names, group = groups.unique(return_inverse=True)
    rank = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).argsort()[group]
    banks = int((rank < round(REFERENCE_SHARE * len(names))).sum())
    behind = int((rank < round(REFERENCE_SHARE * len(names)) + round(CALIBRATION_SHARE * len(names))).sum()) - banks
    return rank.argsort(stable=True), banks, behind
