import pytest
import torch

from guard.triggers import FAMILIES, InvertibleTrigger, Patch

SHAPE = (3, 16, 16)


def several(family: type[InvertibleTrigger], count: int = 4) -> InvertibleTrigger:
    generator = torch.Generator().manual_seed(0)
    return family.constrain(family.start(count, SHAPE, generator))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_stacked_triggers_do_what_each_does_alone(family: type[InvertibleTrigger]) -> None:
    triggers, images = several(family), torch.rand(5, *SHAPE)
    together = triggers.apply(images)
    assert together.shape == (4, 5, *SHAPE)
    assert triggers.norm().shape == (4,)
    for k in range(4):
        torch.testing.assert_close(triggers[k].apply(images), together[k])
        torch.testing.assert_close(triggers[k].norm(), triggers.norm()[k])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_images_stay_images(family: type[InvertibleTrigger]) -> None:
    images = torch.rand(5, *SHAPE).round()
    stamped = several(family).apply(images)
    assert stamped.min() >= 0
    assert stamped.max() <= 1


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tensors_restore_a_trigger(family: type[InvertibleTrigger]) -> None:
    trigger, images = several(family)[2], torch.rand(2, *SHAPE)
    torch.testing.assert_close(family.from_tensors(trigger.tensors()).apply(images), trigger.apply(images))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_gradients_reach_every_parameter(family: type[InvertibleTrigger]) -> None:
    raw = {name: t.requires_grad_() for name, t in family.start(2, SHAPE, torch.Generator().manual_seed(0)).items()}
    trigger = family.constrain(raw)
    (trigger.apply(torch.full((1, *SHAPE), 0.5)).square().sum() + trigger.norm().sum()).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in raw.values())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_trigger_fits_images_of_any_size(family: type[InvertibleTrigger]) -> None:
    assert several(family)[0].apply(torch.rand(2, 3, 40, 40)).shape == (2, 3, 40, 40)


def test_stamping_rounds_to_the_nearest_byte() -> None:
    patch = Patch(torch.full((1, 4, 4), 0.5), torch.ones(3, 4, 4))
    stamped = patch.stamp(torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4))
    assert stamped[:, 0, 0, 0].tolist() == [128, 178, 255]


def test_badnets_is_a_square_in_the_corner_and_touches_nothing_else() -> None:
    patch = Patch.badnets(32, 6, seed=1)
    image = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    changed = (patch.stamp(image) != image).any(1)[0]
    assert float(patch.norm()) == 36
    assert changed[25:31, 25:31].all()
    assert changed.sum() == 36
    assert set(patch.stamp(image)[0, :, 25:31, 25:31].flatten().tolist()) == {0, 255}


def test_the_same_seed_gives_the_same_badnets() -> None:
    assert torch.equal(Patch.badnets(32, 6, seed=1).pattern, Patch.badnets(32, 6, seed=1).pattern)
    assert not torch.equal(Patch.badnets(32, 6, seed=1).pattern, Patch.badnets(32, 6, seed=2).pattern)
