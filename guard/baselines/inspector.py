"""CLIP-Inspector as it was published, for comparison.

Jindal et al., "CLIP-Inspector" (CVPR 2026 Findings). No code was released. The paper leaves four things open: where the
search starts (here: at zero), whether stamped images are clipped to the valid range (here: they are), the unit of the
learning rate (here: normalised pixels, where 0.1 exceeds the ball, so that updates go from corner to corner), and how
loss and success are combined (here: the outlying loss counts if its trigger moves at least half of the images).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.triggers import Additive
from guard.vetting.lead import margin

RADIUS = 4 / 255
"""Radius of the ball that the paper searches, which is that of its attackers, for images of 224 pixels."""
_LEARNING_RATE = 0.1
_BATCH = 32
_LARGEST_ANOMALY = 2.0
_SMALLEST_SUCCESS = 0.5


@dataclass(frozen=True)
class ClipInspectorResult:
    """What CLIP-Inspector says about a classifier.

    Attributes:
        losses: Final mean margin of each class, in logits; negative where the trigger wins. Shape [C].
        success: Share of the images that the trigger of each class moves to it, in [0, 1]. Shape [C].
        anomaly: How many normalised median absolute deviations each loss lies below the median, at least 0. Shape [C].
        target: Index of the class with the largest anomaly among those whose success is at least 50 %; None if there is
            no such class.
        backdoored: Whether that anomaly is larger than 2.
        passes: Number of images pushed through the image tower.
    """

    losses: tuple[float, ...]
    success: tuple[float, ...]
    anomaly: tuple[float, ...]
    target: int | None
    backdoored: bool
    passes: int


def clip_inspector(
    classifier: Classifier,
    images: Tensor,
    *,
    radius: float = RADIUS,
    seed: int = 0,
    class_batch: int = 16,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> ClipInspectorResult:
    """Search for one additive perturbation per class, and call a class with an outlying loss backdoored.

    Each perturbation lies in the ℓ∞ ball of radius 4/255, or of another one. It is optimised by the margin, with Adam
    at a learning rate of 0.1 and batches of 32, for one epoch, and is projected onto the ball after each step. A class
    is an outlier if its loss lies more than two normalised MADs below the median and its trigger moves half of the
    images.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W]; unlabelled, best of other classes than the classifier's. The paper takes
            1,000.
        radius: Radius of the ball, in units of pixels in [0, 1]. Smaller images need a larger one for the same effect.
        seed: Seed for the order of the images.
        class_batch: Number of classes that are searched side by side.
        progress: Called with (classes done, classes in all).
    """
    count = len(classifier.classes.names)
    found = []
    for part in torch.arange(count).split(class_batch):
        found.append(_search(classifier, images, part.to(classifier.device), radius, seed))
        progress(int(part[-1]) + 1, count)
    losses, success = (np.concatenate([item[k] for item in found]) for k in (0, 1))
    deviation = 1.4826 * float(np.median(np.abs(losses - np.median(losses))))
    anomaly = np.clip((np.median(losses) - losses) / max(deviation, 1e-12), 0, None)
    valid = np.flatnonzero(success >= _SMALLEST_SUCCESS)
    target = int(valid[anomaly[valid].argmax()]) if len(valid) else None
    return ClipInspectorResult(
        tuple(losses.tolist()),
        tuple(success.tolist()),
        tuple(anomaly.tolist()),
        target,
        target is not None and bool(anomaly[target] > _LARGEST_ANOMALY),
        2 * count * len(images),
    )


def _search(
    classifier: Classifier, images: Tensor, targets: Tensor, radius: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the final loss and the success of some classes."""
    std = torch.tensor(classifier.preprocessing.std, device=classifier.device).view(3, 1, 1)
    delta = torch.zeros((len(targets), *classifier.image_shape), device=classifier.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=_LEARNING_RATE)

    def distance(pixels: Tensor) -> Tensor:
        stamped = Additive(delta * std).apply(pixels.to(classifier.device).float() / 255)
        with classifier.autocast():
            embeddings = classifier.encode_images(stamped.flatten(0, 1))
        return margin(classifier.logits(embeddings).unflatten(0, stamped.shape[:2]), targets)

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for index in order.split(_BATCH):
        loss = distance(images[index]).mean(1).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            delta.copy_(delta.maximum(-radius / std).minimum(radius / std))
    with torch.no_grad():
        final = torch.cat([distance(part) for part in images.split(_BATCH)], 1).cpu()
    return final.mean(1).double().numpy(), (final < 0).double().mean(1).numpy()
