"""Accuracy of a classifier on clean images, and attack success rate of triggers."""

from collections.abc import Sequence
from dataclasses import dataclass

from guard.attacks.attack import Planted
from guard.attacks.training import LabelledImages
from guard.classifiers.classifier import Classifier


@dataclass(frozen=True)
class Measured:
    """Measurements on images that were not trained on.

    Attributes:
        accuracy: Zero-shot accuracy on clean images, in [0, 1].
        success: Attack success rate of each trigger: the share of stamped images of other classes that go to its
            target, in [0, 1].
    """

    accuracy: float
    success: tuple[float, ...]


def measure(classifier: Classifier, images: LabelledImages, planted: Sequence[Planted]) -> Measured:
    """Measure clean accuracy and the attack success rate of triggers, which may have been planted in another model.

    Args:
        classifier: Any classifier.
        images: Images labelled by its classes.
        planted: Triggers with their targets.
    """
    accuracy = float((classifier.predict(classifier.embed(images.pixels)) == images.labels).float().mean())
    success = []
    for item in planted:
        stamped = item.trigger.stamp(images.pixels[images.labels != item.target])
        success.append(float((classifier.predict(classifier.embed(stamped)) == item.target).float().mean()))
    return Measured(accuracy, tuple(success))
