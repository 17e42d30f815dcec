"""What programs without torch draw is what the classes of the families do."""

import numpy as np
import pytest
import torch

from guard.triggers.families import FAMILIES, KINDS
from guard.triggers.forms import FORMS
from guard.triggers.numpy_apply import DISPLACEMENTS, applied
from tests.conftest import random_images

SIZES = [(16, 16), (96, 96), (23, 31), (8, 40), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_what_the_class_does_at_any_resolution(family: str, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    raw = FAMILIES[family].start(2, (3, 16, 16), generator)
    # As far from doing nothing as a search may go.
    moved = {name: values + torch.randn(values.shape, generator=generator) for name, values in raw.items()}
    for trigger in FAMILIES[family].constrain(moved)[0], FAMILIES[family].constrain(moved)[1]:
        stored = {name: tensor.detach().float() for name, tensor in trigger.tensors().items()}
        images = torch.nn.functional.interpolate(random_images(2, seed=3).float() / 255, size)
        expected = FAMILIES[family].from_tensors(stored).apply(images).detach().numpy()
        tensors = {name: tensor.numpy() for name, tensor in stored.items()}
        for image, should in zip(images.numpy(), expected, strict=True):
            found = applied(family, tensors, image)
            assert found is not None
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, should, atol=2e-5)
            assert size == (1, 1) or np.abs(should - image).max() > 0.01


def test_families_of_attackers_are_not_drawn_and_wrong_tensors_are_refused() -> None:
    image = np.zeros((3, 8, 8), np.float32)
    assert all(applied(family, {}, image) is None for family in KINDS.keys() - FAMILIES.keys())
    assert DISPLACEMENTS.keys() < FORMS.keys()
    for family in FAMILIES:
        with pytest.raises(ValueError, match="it has the tensors none"):
            applied(family, {}, image)
