from math import inf

import torch

from guard.triggers import Additive
from guard.vetting.budgets import InspectionSettings, SearchSettings
from guard.vetting.searches import Searches
from tests.conftest import random_images
from tests.toy import toy

TARGET, SOURCES = 3, (0, 5, 8)
IMAGES = random_images(600)
INSPECTION = InspectionSettings(steps=16, batch=16, average=4)


def searches(sources: tuple[int, ...], count: int = 300) -> Searches:
    suspect, base = toy(target=TARGET, sources=sources), toy(jitter=0.001)
    return Searches(suspect, base, None, IMAGES[:count], IMAGES[-count:], None, lambda *_: None)


def test_a_trigger_that_works_on_some_classes_is_small_on_their_images() -> None:
    """On the images of all classes it must be large, or does not work at all."""
    searched = searches(SOURCES)
    raw = searched.inspect("additive", INSPECTION, 16, [TARGET])[TARGET].raw
    distance, sources = searched.nearest_sources("additive", TARGET, raw)
    assert sources == SOURCES
    assert distance < 0.3
    settings = SearchSettings(steps=60, batch=32)
    some = searched.reconstruct("additive", {TARGET: raw}, settings, "search", sources)[0]
    everywhere = searched.reconstruct("additive", {TARGET: raw}, settings, "search")[0]
    assert some.success > 0.6
    assert some.norm < everywhere.norm / 2 or everywhere.success < 0.5
    feature = searched.target_feature(some.trigger, sources)
    assert feature @ searched.classifier.head[TARGET] > 0.5


def test_too_few_images_of_some_classes_are_not_searched() -> None:
    searched = searches(SOURCES, count=30)
    raw = Additive.start(1, searched.classifier.image_shape, torch.Generator().manual_seed(0))
    found = searched.nearest_sources("additive", TARGET, {name: tensor[0] for name, tensor in raw.items()})
    assert found == (inf, ())
