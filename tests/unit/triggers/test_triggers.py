import pytest
import torch

from guard.triggers import FAMILIES, KNOWN, InvertibleTrigger, Patch

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
    images = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    (trigger.apply(images).square().sum() + trigger.norm().sum()).backward()
    assert all(t.grad is not None and (t.grad != 0).all() for t in raw.values())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_gradients_reach_the_images(family: type[InvertibleTrigger]) -> None:
    images = torch.rand(2, *SHAPE, requires_grad=True)
    several(family).apply(images).sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_trigger_that_vanishes_keeps_its_gradients_finite(family: type[InvertibleTrigger]) -> None:
    """A class that needs no trigger shrinks one for as long as the search goes on."""
    raw = family.start(1, SHAPE, torch.Generator().manual_seed(0))
    faded = {name: t.sub(80).requires_grad_() for name, t in raw.items()}
    trigger = family.constrain(faded)
    (trigger.apply(torch.rand(2, *SHAPE)).sum() + trigger.norm().sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in faded.values())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_trigger_fits_images_of_any_size(family: type[InvertibleTrigger]) -> None:
    for size in ((40, 40), (9, 9), (15, 22)):
        assert several(family)[0].apply(torch.rand(2, 3, *size)).shape == (2, 3, *size)
        assert several(family).apply(torch.rand(2, 3, *size)).shape == (4, 2, 3, *size)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tensors_that_make_no_trigger_are_refused_in_one_line(family: type[InvertibleTrigger]) -> None:
    tensors = several(family)[0].tensors()
    hostile = [({**tensors, "more": torch.zeros(1)}, "it has the tensors"), ({}, "it has the tensors none")]
    for name, tensor in tensors.items():
        hostile += [
            ({key: other for key, other in tensors.items() if key != name}, "it has the tensors"),
            ({**tensors, name: tensor[None]}, f"{name} has shape"),
            ({**tensors, name: tensor.double()}, f"{name} is float64, not float32"),
            ({**tensors, name: torch.full_like(tensor, torch.nan)}, f"{name} has a value that is not finite"),
            ({**tensors, name: torch.full_like(tensor, -1e5)}, f"{name} has a value outside"),
        ]
        if tensor.dim():
            hostile.append(({**tensors, name: tensor[:0]}, "has shape"))
    for changed, reason in hostile:
        with pytest.raises(ValueError, match=reason) as caught:
            family.from_tensors(changed)
        assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern has shape \[3, 8, 9\], not \[3, height, width\]"):
        Patch.from_tensors({"mask": torch.zeros(1, 8, 8), "pattern": torch.zeros(3, 8, 9)})
    with pytest.raises(ValueError, match="at most 4096"):
        Patch.from_tensors({"mask": torch.zeros(1, 1, 5000), "pattern": torch.zeros(3, 1, 5000)})


@pytest.mark.parametrize("name", KNOWN)
def test_what_an_attacker_stores_has_the_declared_form(name: str) -> None:
    for size in (16, 50):
        trigger = KNOWN[name].draw(size, 0)
        assert type(trigger).from_tensors(trigger.tensors()).tensors().keys() == trigger.tensors().keys()


def test_stamping_rounds_to_the_nearest_byte() -> None:
    patch = Patch(torch.full((1, 4, 4), 0.5), torch.ones(3, 4, 4))
    stamped = patch.stamp(torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4))
    assert stamped[:, 0, 0, 0].tolist() == [128, 178, 255]


def test_badnets_is_a_square_in_the_corner_and_touches_nothing_else() -> None:
    patch = Patch.badnets(32, 6, seed=1)
    image = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    changed = (patch.stamp(image) != image).any(1)[0]
    assert float(patch.norm()) == pytest.approx(100 * 36 / 32**2)
    assert changed[25:31, 25:31].all()
    assert changed.sum() == 36
    assert set(patch.stamp(image)[0, :, 25:31, 25:31].flatten().tolist()) == {0, 255}


def test_the_same_seed_gives_the_same_badnets() -> None:
    assert torch.equal(Patch.badnets(32, 6, seed=1).pattern, Patch.badnets(32, 6, seed=1).pattern)
    assert not torch.equal(Patch.badnets(32, 6, seed=1).pattern, Patch.badnets(32, 6, seed=2).pattern)
