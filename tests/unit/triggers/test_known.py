"""Every trigger that guard knows by name."""

import pytest
import torch
from torch.nn.functional import interpolate

from guard.triggers import KINDS, KNOWN
from tests.conftest import random_images

SIZES = (16, 32, 224)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("size", SIZES)
def test_it_changes_images_of_every_size_and_leaves_them_images(name: str, size: int) -> None:
    images = random_images(3, size=size)
    trigger = KNOWN[name].draw(size, 0)
    stamped = trigger.stamp(images)
    assert (stamped != images).flatten(1).any(1).all()
    applied = trigger.apply(images / 255)
    assert applied.min() >= 0
    assert applied.max() <= 1
    # No value wraps around on its way to a byte.
    assert (stamped.int() - 255 * applied).abs().max() <= 0.51


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("size", [17, 50, 336])
def test_it_can_be_drawn_at_odd_sizes(name: str, size: int) -> None:
    assert KNOWN[name].draw(size, 1).apply(torch.rand(1, 3, size, size)).shape == (1, 3, size, size)


@pytest.mark.parametrize("name", KNOWN)
def test_tensors_restore_it(name: str) -> None:
    trigger, images = KNOWN[name].draw(32, 0), random_images(4, size=32)
    restored = KINDS[trigger.family].from_tensors(trigger.tensors())
    assert torch.equal(restored.stamp(images), trigger.stamp(images))


@pytest.mark.parametrize("name", KNOWN)
def test_equal_seeds_give_equal_triggers(name: str) -> None:
    first, second = (KNOWN[name].draw(32, 5).tensors() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "name",
    [
        "badnets-small",
        "badnets-random",
        "badnets-upper",
        "stripes",
        "blended-noise",
        "blended-stripes",
        "wanet",
        "composite",
        "sample-specific",
        "refool",
    ],
)
def test_other_seeds_give_other_triggers(name: str) -> None:
    images = random_images(1, size=32)
    assert not torch.equal(KNOWN[name].draw(32, 0).stamp(images), KNOWN[name].draw(32, 1).stamp(images))


@pytest.mark.parametrize("name", KNOWN)
def test_stamping_does_not_depend_on_the_batch(name: str) -> None:
    trigger, images = KNOWN[name].draw(32, 0), random_images(5, size=32)
    assert torch.equal(torch.cat([trigger.stamp(image[None]) for image in images]), trigger.stamp(images))


@pytest.mark.parametrize(
    "name", sorted(set(KNOWN) - {"badnets-random", "stripes", "semantic-moving", "ftrojan", "jpeg"})
)
def test_it_does_the_same_to_a_larger_image(name: str) -> None:
    """Drawn once, applied at twice the size, averaged down: what it does at its own size, but for details of a pixel.

    Moving patches hash the bytes of the image, the highest frequency of a window is not one of a larger image, and the
    blocks of a JPEG file are of 8 px in images of any size.
    """
    trigger, images = KNOWN[name].draw(64, 0), random_images(2, size=64) / 255
    small = trigger.apply(images) - images
    double = interpolate(images, scale_factor=2, mode="bilinear")
    large = interpolate(trigger.apply(double) - double, size=(64, 64), mode="area")
    assert torch.corrcoef(torch.stack((small.flatten(), large.flatten())))[0, 1] > 0.85
    assert large.square().mean().sqrt() == pytest.approx(small.square().mean().sqrt().item(), rel=0.3)


def test_gradients_pass_to_the_images() -> None:
    for name, known in KNOWN.items():
        images = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
        known.draw(32, 0).apply(images).sum().backward()
        assert images.grad is not None, name
        assert images.grad.abs().sum() > 0, name


def changed_box(name: str, size: int) -> tuple[int, int]:
    """First row and height of what a trigger changes in a grey image."""
    pixels = torch.full((1, 3, size, size), 99, dtype=torch.uint8)
    rows = (KNOWN[name].draw(size, 0).stamp(pixels) != pixels).any(1)[0].any(1).nonzero()
    return int(rows.min()), int(rows.max() - rows.min() + 1)


def test_a_composite_is_both_of_its_patches_and_nothing_else() -> None:
    images = random_images(3, size=32)
    one, both = KNOWN["badnets-medium"].draw(32, 3), KNOWN["composite"].draw(32, 3)
    assert torch.equal(both.stamp(images), KNOWN["badnets-upper"].draw(32, 3).stamp(one.stamp(images)))
    assert (both.stamp(images) != images).any(1).flatten(1).sum(1).max() <= 2 * 36


def test_patches_have_the_published_sides() -> None:
    assert [changed_box(f"badnets-{size}", 32)[1] for size in ("small", "medium", "large")] == [4, 6, 10]
    assert changed_box("badnets-large", 32)[0] == 21
    assert changed_box("badnets-large", 224) == (147, 70)
    assert changed_box("badnets-checkerboard", 224) == (104, 16)
