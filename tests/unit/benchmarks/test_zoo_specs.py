from collections import Counter

import pytest
import torch

from benchmarks.zoo.specs import _ADDED, BASES, SPECS
from guard.attacks import RECIPES
from guard.classifiers.open_clip import import_open_clip


@pytest.mark.parametrize("name", SPECS)
def test_bases_and_twins_stand_before_the_models_that_need_them(name: str) -> None:
    seen: set[str] = set()
    models = SPECS[name](0).models
    for model_name, model in models.items():
        assert {model.base, model.twin} - {None} <= seen
        seen.add(model_name)


@pytest.mark.parametrize("name", SPECS)
def test_a_twin_is_trained_as_the_attack_is_but_without_poison(name: str) -> None:
    models = SPECS[name](0).models
    for model in models.values():
        if model.twin is None:
            assert model.recipe == "base" or not RECIPES[model.recipe].poisons
            continue
        twin, attack = RECIPES[models[model.twin].recipe], RECIPES[model.recipe]
        assert models[model.twin].base == model.base
        assert not twin.poisons
        assert twin.tower == attack.tower
        assert twin.effort >= attack.effort
        assert twin.images == "plain"


@pytest.mark.parametrize(("name", "count"), [("small", 60), ("medium", 36), ("full", 300)])
def test_two_models_in_five_are_negatives(name: str, count: int) -> None:
    models = SPECS[name](0).models
    negatives = sum(model.twin is None for model in models.values())
    assert len(models) >= count
    assert negatives / len(models) >= 0.4


@pytest.mark.parametrize("name", ["small", "full"])
def test_every_recipe_has_a_model(name: str) -> None:
    assert {model.recipe for model in SPECS[name](0).models.values()} == {*RECIPES, "base"}


def test_no_class_is_the_target_much_more_often_than_others() -> None:
    targets = Counter(model.target % 10 for model in SPECS["small"](0).models.values() if model.twin)
    assert set(targets) == set(range(10))
    assert max(targets.values()) - min(targets.values()) <= 1


@pytest.mark.parametrize("kind", BASES)
def test_open_clip_builds_every_base(kind: str) -> None:
    architecture = BASES[kind].architecture
    size = architecture["vision_cfg"]["image_size"]
    with torch.device("meta"):
        model = import_open_clip().CLIP(architecture["embed_dim"], architecture["vision_cfg"], architecture["text_cfg"])
        embedded = model.eval().encode_image(torch.empty(2, 3, size, size))
    assert embedded.shape == (2, architecture["embed_dim"])


def test_another_first_seed_makes_other_models_with_other_targets() -> None:
    developed, fresh = SPECS["small"](0).models, SPECS["small"](10).models
    assert not set(developed) & set(fresh)
    assert Counter(model.recipe for model in developed.values()) == Counter(model.recipe for model in fresh.values())
    assert {model.seed for model in fresh.values()} == {10, 11, 12}
    renamed = {name.replace("digits-1", "digits-").replace("-10", "-0"): model for name, model in fresh.items()}
    assert renamed["digits-0-badclip-0"].target != developed["digits-0-badclip-0"].target


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("small", "digits-20-badnets-small-20", "digits-21-multi-three-21"),
        ("medium", "cifar10-resnet-20-badnets-medium-20", "cifar10-vit-21-pruned-20"),
    ],
)
def test_later_attacks_come_after_the_models_that_zoos_had_before(name: str, first: str, last: str) -> None:
    """A zoo that was built before its spec gained attacks must only lack these."""
    models = SPECS[name](20).models
    names = list(models)
    before = names[: names.index(last) + 1]
    assert first in before
    assert {models[each].recipe for each in before}.isdisjoint(_ADDED)
    assert {models[each].recipe for each in names[len(before) :]} >= set(_ADDED)
    # Targets are counted over the attacks in order, so that none has moved.
    attacks = [models[each].target for each in before if models[each].twin]
    assert attacks == [3 * count + 20 for count in range(len(attacks))]
