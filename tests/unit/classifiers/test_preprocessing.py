import numpy as np
import open_clip
import pytest
from PIL import Image

from guard.classifiers import Preprocessing

MEAN, STD = (0.481, 0.457, 0.408), (0.268, 0.261, 0.275)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(64, 64), (100, 37), (37, 100), (224, 225), (31, 500), (20, 10)])
@pytest.mark.parametrize(("interpolation", "resize_mode"), [("bicubic", "shortest"), ("bilinear", "squash")])
def test_it_is_open_clips_transform_of_the_image_in_rgb_bit_for_bit(
    mode: str, size: tuple[int, int], interpolation: str, resize_mode: str
) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    ours = Preprocessing(48, MEAN, STD, interpolation, resize_mode)  # type: ignore[arg-type]  # parametrised
    theirs = open_clip.image_transform(
        48, is_train=False, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize_mode
    )
    np.testing.assert_array_equal(ours(image), theirs(image.convert("RGB")).numpy())


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="std"):
        Preprocessing(48, MEAN, (0.1, 0.0, 0.1))
    with pytest.raises(ValueError, match="size"):
        Preprocessing(0, MEAN, STD)
