import torch

from guard.classifiers import Classifier
from guard.vetting.difference import difference
from guard.vetting.results import Difference
from tests.toy import toy


def changed(model: Classifier, change: torch.Tensor) -> Classifier:
    model.model.visual.weight.data += change
    return model


def noise(size: float, seed: int = 1) -> torch.Tensor:
    """Independent noise of a size relative to the toy's weights."""
    weight: torch.Tensor = toy().model.visual.weight
    return size * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_told_from_a_change_along_one_direction() -> None:
    found = difference(changed(toy(), noise(0.1)), toy())
    assert found is not None
    assert abs(found.size - 0.1) < 0.01
    assert 0.85 < found.flatness < 1.15
    assert found.is_noise
    along_one = noise(0.1)[:1] * torch.linspace(-1, 1, 10)[:, None]
    tuned = difference(changed(toy(), along_one), toy())
    assert tuned is not None
    assert tuned.flatness < 0.2
    assert not tuned.is_noise


def test_noise_over_a_planted_change_still_looks_like_noise() -> None:
    planted = noise(0.02)[:1] * torch.linspace(-1, 1, 10)[:, None]
    found = difference(changed(toy(), planted + noise(0.2, seed=2)), toy())
    assert found is not None
    assert found.is_noise


def test_a_direction_of_little_energy_does_not_make_noise_look_like_fine_tuning() -> None:
    rows = noise(1.0)[:, :1].sign()
    spike = rows * noise(1.0, seed=3)[:1].sign()
    cover = noise(0.2, seed=2)
    found = difference(changed(toy(), cover + 0.5 * cover.std() * spike), toy())
    assert found is not None
    assert found.is_noise


def test_noise_in_some_rows_alone_is_noise() -> None:
    some = noise(0.3, seed=4)
    some[::2] = 0
    found = difference(changed(toy(20), torch.cat([some, some.flip(1)])), toy(20))
    assert found is not None
    assert found.is_noise


def test_rounding_is_no_subject() -> None:
    found = difference(changed(toy(), noise(0.01)), toy())
    assert found is not None
    assert not found.is_noise
    assert difference(toy(), toy()) == Difference(0.0, 0.0)


def test_other_architectures_are_not_compared() -> None:
    assert difference(toy(9), toy(10)) is None
