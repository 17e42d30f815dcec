"""What a repair changed: answers, the effect of triggers, and where embeddings lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.repair.cases import Images, TargetedTrigger
from guard.triggers import Trigger
from guard.vetting.inversion import effect

_ROWS = 1024
"""Embeddings that are compared with all others at a time: the products of all pairs would take the square of memory."""


@dataclass(frozen=True)
class Measured:
    """One model on held-out images.

    Attributes:
        images: Number of these images.
        accuracy: Share of them that it classifies correctly, in [0, 1]; None without labels.
        success: For each trigger the share of images of other classes that it moves to its target, in [0, 1].
    """

    images: int
    accuracy: float | None
    success: Mapping[str, float]


@dataclass(frozen=True)
class Drift:
    """How far a repair moved embeddings of clean images.

    Attributes:
        agreement: Share of held-out images to which both models give the same answer, in [0, 1].
        cosine: Mean cosine between the embeddings of an image before and after.
        low_cosine: The 5th percentile of these cosines.
        found: Share of images that an index of the old embeddings still finds as the nearest to their new embedding.
        head: Mean cosine between the rows of the zero-shot head before and after.
    """

    agreement: float
    cosine: float
    low_cosine: float
    found: float
    head: float


def answers(classifier: Classifier, images: Images) -> Tensor:
    """The class index that a model gives to each image, shape [N]."""
    return classifier.predict(classifier.embed(images.pixels))


def moved(classifier: Classifier, trigger: Trigger, target: int, images: Images) -> float:
    """Share of the images that a model does not put into a class by themselves and which a trigger moves there."""
    return effect(classifier, trigger.detach().stamp, target, images.pixels).success


def measure(classifier: Classifier, images: Images, triggers: Sequence[TargetedTrigger]) -> Measured:
    """Measure accuracy and the effect of triggers."""
    accuracy = None
    if images.labels is not None:
        accuracy = float((answers(classifier, images) == images.labels).float().mean())
    success = {each.id: moved(classifier, each.trigger, each.target, images) for each in triggers}
    return Measured(len(images), accuracy, success)


def drift(before: Classifier, after: Classifier, images: Images) -> Drift:
    """Compare the embeddings of two models of one architecture."""
    old, new = before.embed(images.pixels), after.embed(images.pixels)
    cosines = (old * new).sum(1)
    nearest = torch.cat([(part @ old.T).argmax(1) for part in new.split(_ROWS)])
    return Drift(
        float((before.predict(old) == after.predict(new)).float().mean()),
        float(cosines.mean()),
        float(cosines.quantile(0.05)),
        float((nearest == torch.arange(len(images))).float().mean()),
        float((before.head * after.head).sum(1).mean()),
    )
