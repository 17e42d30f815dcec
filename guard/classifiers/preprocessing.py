"""The transform from an image to the input of the image tower, without torch.

open_clip builds its transform from torchvision. A sidecar must compute the same values without it, so the transform is
written here once, with Pillow and numpy, and used by vetting and serving alike; a test compares it bit by bit with
`open_clip.image_transform`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 50_000_000
"""Largest image that is held in memory unless a caller says otherwise, when it is decoded and after its short side was
scaled to the model's input: 150 MB as RGB."""

MAX_SIDE = 4096
"""Largest side of a model's input, in pixels."""

Interpolation = Literal["bicubic", "bilinear"]
RESAMPLING: dict[Interpolation, int] = {"bicubic": 3, "bilinear": 2}
"""Pillow's numbers of the filters, which configurations of Hugging Face hold too."""


@dataclass(frozen=True)
class Preprocessing:
    """The deterministic (evaluation) transform of an open_clip image tower.

    Attributes:
        size: Side of the square input, in pixels.
        mean: Per channel, subtracted from values in [0, 1].
        std: Per channel, divided by afterwards.
        interpolation: Resampling filter.
        resize_mode: `shortest` scales the short side to `size` and crops the centre; `squash` scales both sides.
            open_clip's third mode, `longest`, is refused when a model is loaded: no published CLIP uses it.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIDE:
            raise ValueError(f"the input size must be positive and at most {MAX_SIDE}, not {self.size}")
        if {len(self.mean), len(self.std)} != {3}:
            raise ValueError(f"mean and std need a number for each of three channels, not {self.mean} and {self.std}")
        if not min(self.std) > 0:
            raise ValueError(f"every std must be positive, not {self.std}")
        with np.errstate(all="ignore"):
            extremes = self.normalise(np.array([0.0, 1.0], np.float32).reshape(2, 1, 1, 1))
        if not np.isfinite(extremes).all():
            raise ValueError(f"with a mean of {self.mean} and a std of {self.std}, pixels do not become finite numbers")

    def pixels(self, image: "Image.Image", *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Resize and crop: uint8, shape [3, size, size], before normalisation.

        Args:
            image: An image in RGB, as `guard.classifiers.decode` makes it. An image of another mode is converted
                first: open_clip converts after it has resized, which gives other pixels where there is a palette or
                alpha.
            max_pixels: The most pixels that the resized image may have before it is cropped.

        Raises:
            ImageError: Resized, the image has more than `max_pixels` pixels: a strip of 1 × 10,000,000 is small until
                its short side is scaled up.
        """
        if image.mode != "RGB":
            image = image.convert("RGB")
        resampling = RESAMPLING[self.interpolation]
        size = self.size
        if self.resize_mode == "squash":
            image = image if image.size == (size, size) else image.resize((size, size), resampling)
        else:
            width, height = image.size
            short, long = sorted((width, height))
            if short != size:
                scaled = int(size * long / short)
                if size * scaled > max_pixels:
                    raise ImageError(
                        f"the image is too narrow ({width}×{height}); resized it has over {max_pixels} pixels"
                    )
                image = image.resize((size, scaled) if width <= height else (scaled, size), resampling)
            width, height = image.size
            left, top = round((width - size) / 2.0), round((height - size) / 2.0)
            image = image.crop((left, top, left + size, top + size))
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

    def normalise(self, pixels: NDArray[np.uint8] | Floats) -> Floats:
        """Turn pixels, uint8 or float32 in [0, 1], into the tower's input: float32, shape […, 3, size, size]."""
        scaled = pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels
        mean = np.asarray(self.mean, np.float32)[:, None, None]
        std = np.asarray(self.std, np.float32)[:, None, None]
        normalised: Floats = (scaled - mean) / std
        return normalised

    def restore(self, normalised: Floats) -> Floats:
        """Invert `normalise`: float32 pixels, in [0, 1] if the original pixels were."""
        mean = np.asarray(self.mean, np.float32)[:, None, None]
        std = np.asarray(self.std, np.float32)[:, None, None]
        pixels: Floats = normalised * std + mean
        return pixels

    def __call__(self, image: "Image.Image", *, max_pixels: int = MAX_PIXELS) -> Floats:
        """The tower's input for one image: float32, shape [3, size, size]; raises as `pixels` does."""
        return self.normalise(self.pixels(image, max_pixels=max_pixels))
