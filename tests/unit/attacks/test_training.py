from dataclasses import replace

import torch

from guard.attacks import LabelledImages, measure, train_base
from guard.classifiers import Classifier
from tests.conftest import CLASSES, CONFIG
from tests.unit.attacks.conftest import SETTINGS


def test_a_base_learns_its_images(base: Classifier, data: LabelledImages) -> None:
    assert measure(base, data, ()).accuracy > 0.8


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(data: LabelledImages) -> None:
    short = replace(SETTINGS, epochs=1)
    first, again, other = (
        train_base(CONFIG, CLASSES, data, replace(short, seed=seed), device=torch.device("cpu")).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
