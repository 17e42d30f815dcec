"""Compression: the image after it was a JPEG file of low quality."""

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from guard.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class Compression(Trigger):
    """x ↦ x, encoded as JPEG and decoded again: compression artefacts as the trigger.

    After the idea of Duan et al. ("Conditional backdoor attack via JPEG compression", AAAI 2024): compression activates
    the backdoor. The encoder is libjpeg's through Pillow, with its defaults: 4:2:0 chroma, blocks of 8 × 8 pixels.
    Blocks do not grow with the image.

    Attributes:
        quality: JPEG quality as libjpeg counts it: a whole number from 1 to 100; shape [].
    """

    quality: Tensor

    family: ClassVar[str] = "compression"

    def apply(self, images: Tensor) -> Tensor:
        """Compress each image by itself; the gradient passes as if nothing was compressed."""
        pixels = (255 * images.detach()).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        decoded = np.stack([_recompressed(image, round(float(self.quality))) for image in pixels])
        compressed = torch.from_numpy(decoded).permute(0, 3, 1, 2).to(images) / 255
        return images + (compressed - images).detach()


def _recompressed(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return an image, shape [H, W, 3], as a JPEG file shows it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))
