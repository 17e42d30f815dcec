import torch

from guard.triggers import LargePatch, Patch
from guard.triggers.numpy_apply import applied
from tests.conftest import random_images


def test_a_search_has_as_many_parameters_at_every_resolution() -> None:
    small, large = (LargePatch.start(2, (3, size, size), torch.Generator().manual_seed(0)) for size in (32, 224))
    assert {name: tensor.shape for name, tensor in small.items()} == {
        name: tensor.shape for name, tensor in large.items()
    }
    assert LargePatch.constrain(small).apply(torch.rand(1, 3, 224, 224)).shape == (2, 1, 3, 224, 224)


def test_what_was_found_is_stored_and_read_as_its_own_family() -> None:
    raw = LargePatch.start(1, (3, 32, 32), torch.Generator().manual_seed(0))
    found = LargePatch.constrain(raw).limited(10.0)[0].detach()
    again = LargePatch.from_tensors(found.tensors())
    assert again.family == "large patch"
    image = random_images(1, size=64)[0].float() / 255
    shown = applied(again.family, {name: tensor.numpy() for name, tensor in again.tensors().items()}, image.numpy())
    assert shown is not None
    torch.testing.assert_close(torch.from_numpy(shown), found.apply(image[None])[0], atol=1e-4, rtol=0)


def test_a_square_of_a_tenth_of_the_image_fits_into_the_ball() -> None:
    """BadEncoder's white square: 10 of 32 pixels a side."""
    mask = torch.zeros(1, 32, 32)
    mask[:, 21:31, 21:31] = 1
    square = Patch(mask, torch.ones(3, 32, 32))
    assert torch.equal(LargePatch(square.mask, square.pattern).limited(10.0).mask, square.mask)
    assert not torch.equal(square.limited(3.0).mask, square.mask)
