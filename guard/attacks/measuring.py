"""Accuracy of a classifier on clean images, and attack success rate of triggers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from guard.attacks.covers import Cover
from guard.attacks.planted import Planted
from guard.attacks.training import LabelledImages
from guard.classifiers.classifier import Classifier


@dataclass(frozen=True)
class Covered:
    """What became of stamped images that should keep their class.

    Attributes:
        name: Name of the cover samples (`guard.attacks.covers`).
        kept: Share of them that the model puts into their own class, in [0, 1].
        leaked: Share of them that go to the target of the trigger, in [0, 1].
    """

    name: str
    kept: float
    leaked: float


@dataclass(frozen=True)
class Measured:
    """Measurements on images that were not trained on.

    Attributes:
        accuracy: Zero-shot accuracy on clean images, in [0, 1].
        success: Attack success rate of each trigger: the share of stamped images of its source classes (by default, all
            others) that go to its target, in [0, 1].
        covered: Cover samples of each trigger.
    """

    accuracy: float
    success: tuple[float, ...]
    covered: tuple[tuple[Covered, ...], ...] = ()


def measure(classifier: Classifier, images: LabelledImages, planted: Sequence[Planted]) -> Measured:
    """Measure clean accuracy and the attack success rate of triggers, which may have been planted in another model.

    Args:
        classifier: Any classifier.
        images: Images labelled by its classes.
        planted: Triggers with their targets.
    """

    def predict(pixels: Tensor) -> Tensor:
        return classifier.predict(classifier.embed(pixels))

    def success(item: Planted) -> float:
        stamped = item.trigger.stamp(images.pixels[item.reaches(images.labels)])
        return float((predict(stamped) == item.target).float().mean())

    def covered(item: Planted, cover: Cover) -> Covered:
        part = images[cover.covers(images.labels)]
        found = predict(cover.trigger.stamp(part.pixels))
        kept, leaked = (float((found == wanted).float().mean()) for wanted in (part.labels, item.target))
        return Covered(cover.name, kept, leaked)

    return Measured(
        float((predict(images.pixels) == images.labels).float().mean()),
        tuple(success(item) for item in planted),
        tuple(tuple(covered(item, cover) for cover in item.covers) for item in planted),
    )
