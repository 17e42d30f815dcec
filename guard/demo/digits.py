"""The demo's data: scikit-learn's 1,797 handwritten digits as colour images."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from guard.attacks import LabelledImages
from guard.classifiers.classes import ClassList

CLASSES = ClassList(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("a photo of the digit {}.", "a handwritten {}.", "the number {}.", "a picture of a {}, written by hand."),
)
SIZE = 32
COUNT = 1797
"""Number of digits in the data set."""


def digits(renderings: int, *, seed: int) -> tuple[LabelledImages, Tensor]:
    """Every digit, drawn `renderings` times in random colours.

    The 8 × 8 originals are scaled up (bilinear) and drawn as ink on paper: a dark background with a light
    stroke or the reverse, both tinted, with a little sensor noise.

    Args:
        renderings: Number of colourings of each digit.
        seed: Seed for the colours, the noise, and the order.

    Returns:
        The images, shape [1797 × renderings, 3, 32, 32] in uint8, and for each the index of its original (so that
        splits can keep all renderings of one digit together).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.target))
    grey = torch.from_numpy(data.images[order] / 16.0).float()[:, None]
    grey = interpolate(grey, size=(SIZE, SIZE), mode="bilinear").clamp(0, 1)
    labels = torch.from_numpy(data.target[order].astype(np.int64))
    parts = []
    for _ in range(renderings):
        count = len(labels)
        dark = rng.uniform(0.0, 0.35, (count, 3, 1, 1))
        light = rng.uniform(0.65, 1.0, (count, 3, 1, 1))
        swap = rng.random((count, 1, 1, 1)) < 0.5
        paper = torch.from_numpy(np.where(swap, light, dark)).float()
        ink = torch.from_numpy(np.where(swap, dark, light)).float()
        noise = torch.from_numpy(rng.normal(0, 0.03, (count, 3, SIZE, SIZE))).float()
        drawn = (paper + grey * (ink - paper) + noise).clamp(0, 1)
        parts.append((drawn * 255).round().to(torch.uint8))
    originals = torch.arange(len(labels)).repeat(renderings)
    return LabelledImages(torch.cat(parts), labels.repeat(renderings)), originals
