"""From vetting to a profile, and from images to its banks and threshold."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor

from guard import __version__
from guard._types import Floats
from guard.classifiers.classifier import Classifier
from guard.errors import ImageError, ProfileError
from guard.profiles.profile import (
    SCHEMA,
    CalibrationRecord,
    Document,
    LeftOut,
    ModelRecord,
    Profile,
    Reference,
    TriggerRecord,
    VettingRecord,
)
from guard.profiles.vocabulary import nearest
from guard.screening import Banks, Detector, Screen, default_k, match, threshold
from guard.screening.hygiene import LIMIT, triggered
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
        vetting.results,
        vetting.checks,
        asdict(vetting.effort),
        vetting.images,
        vetting.reference_model,
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
    per_class: bool = False,
    names: Sequence[str] | None = None,
    groups: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Build reference and stamped banks and set the threshold.

    The images are split at random: 40 % into the banks, 40 % behind the threshold, and on the last 20 % the false
    alarms are counted. They must be clean, of the kind that the deployment will see, and not ones that the model was
    trained on: a model knows its training images better, and the threshold would be too low.

    Images that seem to carry a reconstructed trigger are left out of banks and threshold, and listed
    (`guard.screening.hygiene`). Where these were clean after all, the rate of false alarms may exceed alpha by the
    share of them among the images behind the threshold.

    Args:
        profile: Of this classifier.
        classifier: Computes the embeddings.
        images: uint8, shape [N, 3, H, W], at the classifier's resolution.
        alpha: False-alarm rate that the operator accepts, in (0, 1).
        k: Neighbour that distances are taken to; default is `default_k`.
        per_class: Whether alpha shall hold for each predicted class that has enough images.
        names: Of the images, for those that are left out; default is their number.
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
    _check_size(banks, k, len(images))
    progress(f"embedding {len(images)} images")
    embeddings = classifier.embed(images).numpy()[order.numpy()]
    stamped = {}
    for name, trigger in load_triggers(profile).items():
        progress(f"embedding {banks} images with the trigger {name}")
        stamped[name] = classifier.embed(trigger.stamp(images[order[:banks]])).numpy()
    called = [str(int(place)) if names is None else names[int(place)] for place in order]
    head = np.ascontiguousarray(classifier.head.float().cpu().numpy().T)
    fitted, left_out = _fit(profile, embeddings[:banks], stamped, head, k, called)
    return _threshold(profile, fitted, embeddings[banks:], behind, alpha, per_class, seed, left_out, called[banks:])


def calibrate_embeddings(
    profile: Profile, embeddings: Floats, alpha: float, *, per_class: bool = False, seed: int = 0
) -> Profile:
    """Set the threshold of a calibrated profile anew, from embeddings of clean requests, such as recorded traffic.

    The banks stay: stamping needs pixels. Two thirds of the embeddings go behind the threshold, on the others the false
    alarms are counted.

    Args:
        profile: Calibrated with images before.
        embeddings: Shape [N, D], as the model computed them; clean.
        alpha: False-alarm rate, in (0, 1).
        per_class: Whether alpha shall hold for each predicted class that has enough embeddings.
        seed: Of the split.

    Raises:
        ProfileError: The profile has no banks yet.
        RequestError: The embeddings are not such of this model.
        UsageError: There are too few for this alpha.
    """
    if profile.reference is None or profile.document.calibration is None:
        raise ProfileError(
            "the profile has no banks yet; calibrate it with images once, embeddings only replace the threshold"
        )
    order = np.random.default_rng(seed).permutation(len(embeddings))
    left_out = tuple(item for item in profile.document.calibration.left_out if item.part == "bank")
    behind = round(len(order) * CALIBRATION_SHARE / (1 - REFERENCE_SHARE))
    called = [str(place) for place in order]
    return _threshold(
        profile, profile.reference.banks, embeddings[order], behind, alpha, per_class, seed, left_out, called
    )


def _check_size(banks: int, k: int, count: int) -> None:
    if banks <= k:
        raise ImageError(f"banks with k = {k} need more than {round(k / REFERENCE_SHARE)} images, there are {count}")


def _fit(
    profile: Profile, clean: Floats, stamped: dict[str, Floats], head: Floats, k: int, names: Sequence[str]
) -> tuple[Banks, tuple[LeftOut, ...]]:
    """The banks, without the images that seem to carry a trigger."""
    targets = {record.id: record.target for record in profile.document.triggers}
    try:
        carrying = triggered(clean, {name: (targets[name], bank) for name, bank in stamped.items()}, head, k=k)
        kept = np.array([row not in carrying for row in range(len(clean))])
        _check_size(int(kept.sum()), k, len(names))
        banks = Banks.fit(clean[kept], {name: bank[kept] for name, bank in stamped.items()}, head, k=k)
    except ValueError as error:
        raise ImageError(f"these images make no bank: {error}") from error
    return banks, tuple(LeftOut(names[row], "bank", trigger) for row, trigger in carrying.items())


def _threshold(
    profile: Profile,
    banks: Banks,
    embeddings: Floats,
    behind: int,
    alpha: float,
    per_class: bool,  # noqa: FBT001 - handed through
    seed: int,
    left_out: tuple[LeftOut, ...],
    names: Sequence[str],
) -> Profile:
    """Score the first `behind` embeddings, set the threshold, and count false alarms on the others."""
    screen = Screen(banks)
    clean = screen.score_samples(embeddings[:behind])
    surprises = [banks.tails[match(name)].pure(clean.parts[match(name)]) for name in screen.triggers]
    carrying = np.max(surprises, axis=0) > LIMIT if surprises else np.zeros(behind, bool)
    more = tuple(
        LeftOut(names[int(row)], "calibration", screen.triggers[clean.triggers[row]])
        for row in np.flatnonzero(carrying)
    )
    clean = clean.of(~carrying)
    detector = Detector(screen, clean, alpha, per_class=per_class)
    held_out = embeddings[behind:]
    alarms = int(detector.judge(held_out).flags.sum()) if len(held_out) else 0
    record = CalibrationRecord(
        banks.k,
        banks.tails,
        banks.whitening.shrinkage,
        threshold(clean.values, alpha),
        per_class,
        len(banks.reference),
        len(held_out),
        alarms,
        left_out + more,
        seed,
    )
    return replace(profile, document=replace(profile.document, calibration=record), reference=Reference(banks, clean))


def _split(groups: Tensor, seed: int) -> tuple[Tensor, int, int]:
    """An order of the images, how many of them go into the banks, and how many of the next behind the threshold."""
    names, group = groups.unique(return_inverse=True)
    rank = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).argsort()[group]
    banks = int((rank < round(REFERENCE_SHARE * len(names))).sum())
    behind = int((rank < round(REFERENCE_SHARE * len(names)) + round(CALIBRATION_SHARE * len(names))).sum()) - banks
    return rank.argsort(stable=True), banks, behind
