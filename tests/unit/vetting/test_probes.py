from pathlib import Path

import pytest
import torch

from guard.classifiers import Classifier
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import UsageError
from guard.vetting.probes import EXAMINED, SCREENED, Probe, listed_probes, probe_classes, read_probes
from tests.conftest import random_images
from tests.toy import checkerboard, toy
from tests.unit.classifiers.test_prompts import learner

IMAGES = random_images(64)
TARGET = 3


def planted(images: torch.Tensor) -> torch.Tensor:
    return (images + 0.1 * checkerboard()).clamp(0, 1)


@pytest.mark.parametrize("probe", listed_probes(), ids=lambda probe: probe.name)
@pytest.mark.parametrize("size", [(32, 32), (17, 30)])
def test_every_listed_probe_changes_images_in_the_same_way_each_time(probe: Probe, size: tuple[int, int]) -> None:
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    before, state = images.clone(), torch.random.get_rng_state()
    changed = probe.change(images)
    assert torch.equal(images, before)
    assert changed.shape == images.shape
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    assert not torch.equal(changed, images)
    assert torch.equal(changed, probe.change(images))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_probes_have_names_of_their_own() -> None:
    assert len({probe.name for probe in listed_probes()}) == len(listed_probes())


def test_the_class_of_a_planted_change_gains_and_no_other_does() -> None:
    probes = [*listed_probes()[:20], Probe("planted", planted)]
    found = probe_classes(toy(target=TARGET, jitter=0.02), IMAGES, probes, reference_model=toy())
    assert int(found.gains.argmax()) == TARGET
    assert int(found.probes[TARGET]) == 20
    others = torch.cat([found.gains[:TARGET], found.gains[TARGET + 1 :]])
    assert float(found.gains[TARGET]) > 0.5 > 0.3 > float(others.max())


def test_what_moves_the_reference_model_too_is_no_gain() -> None:
    suspect, probes = toy(target=TARGET), [Probe("planted", planted)]
    assert float(probe_classes(suspect, IMAGES, probes).gains[TARGET]) > 0.5
    found = probe_classes(suspect, IMAGES, probes, reference_model=toy(target=TARGET, jitter=0.02))
    assert float(found.gains[TARGET]) < 0.1


def test_the_passes_do_not_depend_on_the_classes() -> None:
    probes, images = listed_probes()[:15], random_images(200)
    few, many = (probe_classes(toy(classes), images, probes, reference_model=toy(classes)) for classes in (5, 40))
    assert few.passes == many.passes == 2 * (15 * SCREENED + (1 + 12) * EXAMINED)
    assert many.gains.shape == (40,)


def test_images_pass_the_towers_of_a_prompt_learner_and_of_its_reference_once(classifier: Classifier) -> None:
    suspect, probes = PromptedClassifier(classifier, learner("cocoop")), listed_probes()[:4]
    apart = classifier.with_model(classifier.model, "the same towers, as another classifier")
    together, separate = (
        probe_classes(suspect, IMAGES, probes, reference_model=towers) for towers in (classifier, apart)
    )
    assert separate.passes == 2 * together.passes
    torch.testing.assert_close(together.gains, separate.gains, equal_nan=True)


def test_a_list_expands_to_every_combination(tmp_path: Path) -> None:
    path = tmp_path / "probes.toml"
    path.write_text('[[probe]]\nkind = "half"\npart = ["left", "top"]\nbrightness = [0.1, 0.2]\n')
    assert [probe.name for probe in read_probes(path)] == [
        "half part left brightness 0.1",
        "half part left brightness 0.2",
        "half part top brightness 0.1",
        "half part top brightness 0.2",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[probe]]\nkind = "dance"', "no kind 'dance'"),
        ("[[probe]]\nwidth = 0.1", "no kind 'None'"),
        ('[[probe]]\nkind = "blur"', "width"),
        ('[[probe]]\nkind = "blur"\nwidth = 0.1\nheight = 1', "height"),
        ('[[probe]]\nkind = "blur"\nwidth = 2', "less than or equal to 1"),
        ('[[probe]]\nkind = "colours"\nname = "ultraviolet"', "no colours 'ultraviolet'"),
        ('[[probe]]\nkind = "patch"\npattern = "white"\nplace = "outside"\nside = 0.1', "no place 'outside'"),
        ('probe = "blur"', "list"),
        ("[[other]]\n", "tables"),
        ("[[probe]", "not valid TOML"),
    ],
)
def test_what_is_no_probe_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "probes.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_probes(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
