"""What a classifier does with clean and with triggered images."""

from collections.abc import Sequence
from dataclasses import dataclass

from guard.attacks.attack import Planted
from guard.attacks.training import LabelledImages
from guard.classifiers.classifier import Classifier


@dataclass(frozen=True)
class Measured:
    """Of images that nothing was trained on.

    Attributes:
        accuracy: Zero-shot accuracy on clean images, in [0, 1].
        success: For each trigger, the share of stamped images of other classes that go to its target.
    """

    accuracy: float
    success: tuple[float, ...]


def measure(classifier: Classifier, images: LabelledImages, planted: Sequence[Planted]) -> Measured:
    """Clean accuracy, and the success of triggers: the attacker's own, or someone else's as a reference model.

    Args:
        classifier: Of any origin.
        images: Labelled by its classes.
        planted: Triggers with their targets.
    """
    accuracy = float((classifier.predict(classifier.embed(images.pixels)) == images.labels).float().mean())
    success = []
    for item in planted:
        stamped = item.trigger.stamp(images.pixels[images.labels != item.target])
        success.append(float((classifier.predict(classifier.embed(stamped)) == item.target).float().mean()))
    return Measured(accuracy, tuple(success))
