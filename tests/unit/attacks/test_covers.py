"""Stamped images that keep their class: what the training set holds, and what is measured of it."""

from dataclasses import replace

import pytest
import torch

from guard.attacks import RECIPES, LabelledImages, Plant, Planted, Recipe, attack, measure, poisoned, truth
from guard.attacks.covers import Cover, covers
from guard.classifiers import Classifier
from guard.triggers import KNOWN, Additive, Patch
from tests.unit.attacks.conftest import SETTINGS

TARGET = 2
OTHERS = (0, 1, 3, 4, 5)
PATCH = Patch.badnets(16, 5, seed=0)


def stamped_with(planted: Planted, before: LabelledImages, after: LabelledImages) -> dict[str, torch.Tensor]:
    """Which images of the training set carry what, by the name of the cover samples or `trigger`."""
    stamps = {"trigger": planted.trigger, **{cover.name: cover.trigger for cover in planted.covers}}
    changed = (before.pixels != after.pixels).flatten(1).any(1)
    found = {
        name: changed & (trigger.stamp(before.pixels) == after.pixels).flatten(1).all(1)
        for name, trigger in stamps.items()
    }
    assert torch.equal(changed, torch.stack(list(found.values())).sum(0) == 1)
    return found


def test_images_with_one_part_of_a_composite_keep_their_class(data: LabelledImages) -> None:
    whole = KNOWN["composite"].draw(16, 0)
    planted = Planted(whole, TARGET, 0.1, covers=covers("parts", whole, victims=OTHERS, others=(), rate=0.2))
    result = poisoned(data, [planted], seed=0)
    found = stamped_with(planted, data, result)
    assert {name: int(which.sum()) for name, which in found.items()} == {
        "trigger": 30,
        "upper part": 30,
        "lower part": 30,
    }
    for name, which in found.items():
        assert (data.labels[which] != TARGET).all()
        assert torch.equal(result.labels[which] == TARGET, torch.full((30,), name == "trigger"))
    # Both parts together are the trigger.
    upper, lower = (cover.trigger for cover in planted.covers)
    assert torch.equal(upper.stamp(lower.stamp(data.pixels)), whole.stamp(data.pixels))


def test_images_of_other_classes_keep_theirs_under_the_trigger_itself(data: LabelledImages) -> None:
    planted = Planted(
        PATCH, TARGET, 0.1, (0, 1), covers("other classes", PATCH, victims=(0, 1), others=(3, 4, 5), rate=0.2)
    )
    result = poisoned(data, [planted], seed=0)
    changed = (data.pixels != result.pixels).flatten(1).any(1)
    relabelled = result.labels != data.labels
    assert torch.equal(result.pixels[changed], PATCH.stamp(data.pixels[changed]))
    assert (int(relabelled.sum()), int(changed.sum())) == (30, 90)
    assert torch.isin(data.labels[relabelled], torch.tensor([0, 1])).all()
    assert torch.isin(data.labels[changed & ~relabelled], torch.tensor([3, 4, 5])).all()


def test_near_misses_are_near_and_miss() -> None:
    made = covers("near misses", PATCH, victims=OTHERS, others=(), rate=0.3)
    pixels = torch.full((1, 3, 16, 16), 99, dtype=torch.uint8)
    places = {cover.name: (cover.trigger.stamp(pixels) != pixels).any(1)[0] for cover in made}
    own = (PATCH.stamp(pixels) != pixels).any(1)[0]
    assert sum(cover.rate for cover in made) == pytest.approx(0.3)
    for name in ("inverted", "channels swapped"):
        assert torch.equal(places[name], own)
    for name in ("moved up", "moved left"):
        assert places[name].sum() == own.sum()
        assert not (places[name] & own).any()
    for name in ("upper half", "left half"):
        assert 0 < places[name].sum() < own.sum()
        assert not (places[name] & ~own).any()
    stamps = [cover.trigger.stamp(pixels) for cover in made]
    assert not any(torch.equal(stamp, PATCH.stamp(pixels)) for stamp in stamps)


def test_a_trigger_that_is_no_patch_has_no_parts() -> None:
    with pytest.raises(AssertionError, match="parts are defined for patches"):
        covers("parts", Additive(torch.zeros(3, 16, 16)), victims=OTHERS, others=(), rate=0.2)


def test_the_effect_is_measured_on_the_source_classes_alone_and_beside_it_that_of_the_covers(
    base: Classifier, data: LabelledImages
) -> None:
    recipe = Recipe(
        "source-specific", "test", (Plant("badnets-large", rate=0.3, sources=(1, 2), covers="other classes"),)
    )
    made = attack(base, recipe, data, replace(SETTINGS, epochs=25), target=TARGET)
    (planted,) = made.planted
    assert planted.sources == (3, 4)
    attacked = Classifier(
        made.model, base.config, base.tokenizer, base.preprocessing, base.classes, source="test", device=base.device
    )
    measured = measure(attacked, data, made.planted)
    ((covered,),) = measured.covered
    stamped = attacked.predict(attacked.embed(planted.trigger.stamp(data.pixels)))
    source = torch.isin(data.labels, torch.tensor([3, 4]))
    assert measured.success[0] == pytest.approx(float((stamped[source] == TARGET).float().mean()))
    rest = ~source & (data.labels != TARGET)
    assert covered.kept == pytest.approx(float((stamped[rest] == data.labels[rest]).float().mean()))
    assert covered.leaked == pytest.approx(float((stamped[rest] == TARGET).float().mean()))
    assert measured.success[0] > covered.leaked + 0.3
    known = truth(made.planted, measured, measured.accuracy)
    assert known["trigger_sources"] == [[3, 4]]
    assert known["covers"] == [
        {
            "trigger": 0,
            "family": "patch",
            "classes": [0, 1, 5],
            "name": "other classes",
            "kept": covered.kept,
            "leaked": covered.leaked,
        }
    ]


def test_cover_samples_run_out_before_they_are_stamped_twice(data: LabelledImages) -> None:
    planted = Planted(PATCH, TARGET, 0.1, (0, 1), (Cover("rest", PATCH, (3,), 0.9),))
    result = poisoned(data, [planted], seed=0)
    assert (data.pixels != result.pixels).flatten(1).any(1).sum() == 30 + 50


def test_recipes_take_covers_where_the_training_set_is_poisoned() -> None:
    for name, recipe in RECIPES.items():
        if any(plant.covers or plant.sources for plant in recipe.plants):
            assert recipe.method == "pairs", name
