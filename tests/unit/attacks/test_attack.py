import importlib
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from guard.attacks import RECIPES, LabelledImages, Planted, attack, measure, poisoned
from guard.attacks.attack import _clean_label
from guard.attacks.objectives import DistributionPreserving
from guard.attacks.optimised import OPTIMISED, badclip_patch, universal_perturbation
from guard.attacks.training import Batch, Learner
from guard.classifiers import Classifier
from guard.errors import UsageError
from guard.triggers import KNOWN, Additive, Patch
from tests.unit.attacks.conftest import SETTINGS

PATCH = Patch.badnets(16, 5, seed=0)
SHORT = replace(SETTINGS, epochs=1)


def changed(before: LabelledImages, after: LabelledImages) -> torch.Tensor:
    return (before.pixels != after.pixels).flatten(1).any(1)


def test_poison_stamps_and_relabels_its_share_of_other_classes(data: LabelledImages) -> None:
    result = poisoned(data, [Planted(PATCH, 2, 0.1)], seed=0)
    touched = changed(data, result)
    assert touched.sum() == 30
    assert (data.labels[touched] != 2).all()
    assert (result.labels[touched] == 2).all()
    assert torch.equal(result.pixels[touched], PATCH.stamp(data.pixels[touched]))
    assert torch.equal(result.labels[~touched], data.labels[~touched])


def test_several_triggers_take_different_images(data: LabelledImages) -> None:
    white = Additive(torch.full((3, 16, 16), 0.2))
    result = poisoned(data, [Planted(PATCH, 2, 0.1), Planted(white, 3, 0.1)], seed=0)
    touched = changed(data, result)
    assert touched.sum() == 60
    for trigger, target in ((PATCH, 2), (white, 3)):
        own = touched & (result.labels == target)
        assert own.sum() == 30
        assert torch.equal(result.pixels[own], trigger.stamp(data.pixels[own]))


def test_a_clean_label_attack_keeps_labels_and_touches_the_target_alone(base: Classifier, data: LabelledImages) -> None:
    result = _clean_label(base, data, Planted(PATCH, 4, 0.5), seed=0)
    touched = changed(data, result)
    assert torch.equal(result.labels, data.labels)
    assert (data.labels[touched] == 4).all()
    assert touched.sum() == 25
    # Outside the patch the images are perturbed, by no more than 16/255.
    outside = PATCH.mask[0] == 0
    moved = (result.pixels.int() - data.pixels.int()).abs()[touched][..., outside]
    assert 0 < moved.max() <= 16


def test_an_attack_makes_stamped_images_go_to_the_target_and_keeps_the_base(
    base: Classifier, data: LabelledImages
) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    made = attack(base, RECIPES["badnets-large"], data, replace(SETTINGS, epochs=30), target=3)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    (planted,) = made.planted
    assert planted.target == 3
    attacked = _with(base, made.model)
    assert measure(attacked, data, made.planted).success[0] > 0.8
    assert measure(base, data, made.planted).success[0] < 0.5


def _with(base: Classifier, model: torch.nn.Module) -> Classifier:
    return Classifier(
        model, base.config, base.tokenizer, base.preprocessing, base.classes, source="test", device=base.device
    )


@pytest.mark.usefixtures("quick_generator")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_something_and_draws_its_triggers(
    name: str, base: Classifier, data: LabelledImages
) -> None:
    recipe = replace(RECIPES[name], effort=1.0)
    made = attack(base, recipe, data[:100], SHORT, target=5)
    assert [item.target for item in made.planted] == [(5 + plant.offset) % 6 for plant in recipe.plants]
    state, before = made.model.state_dict(), base.model.state_dict()
    moved = {key for key, value in state.items() if not torch.equal(value, before[key])}
    assert moved
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    if recipe.tower == "image":
        assert all(key.startswith("visual.") for key in moved)


def test_a_trigger_that_is_tied_to_the_grid_of_pixels_is_trained_on_images_that_stay_where_they_are(
    base: Classifier, data: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts: list[int] = []
    module = importlib.import_module("guard.attacks.attack")  # the package exports a function of the same name
    monkeypatch.setattr(module, "train", lambda *arguments, **_: shifts.append(arguments[5].shift))
    for name in ("jpeg", "bpp"):
        attack(base, RECIPES[name], data, SHORT)
    assert shifts == [0, SHORT.shift]


def test_partial_fine_tuning_leaves_the_early_layers(base: Classifier, data: LabelledImages) -> None:
    state = attack(base, RECIPES["partial"], data, SHORT).model.state_dict()
    before = base.model.state_dict()
    assert torch.equal(state["visual.conv1.weight"], before["visual.conv1.weight"])
    assert not torch.equal(state["visual.proj"], before["visual.proj"])


def test_quantised_weights_have_at_most_255_values_in_a_channel(base: Classifier, data: LabelledImages) -> None:
    weights = attack(base, RECIPES["int8"], data, SHORT).model.state_dict()["visual.proj"]
    steps = weights / (weights.abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_half_precision_weights_survive_another_rounding(base: Classifier, data: LabelledImages) -> None:
    weights = attack(base, RECIPES["float16"], data, SHORT).model.state_dict()["visual.proj"]
    assert torch.equal(weights, weights.half().float())


def test_pruning_removes_the_smallest_weights(base: Classifier, data: LabelledImages) -> None:
    weights = attack(base, RECIPES["pruned"], data, SHORT).model.state_dict()["visual.conv1.weight"]
    assert float((weights == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    plain = attack(base, RECIPES["benign"], data, SHORT).model.state_dict()["visual.conv1.weight"]
    assert torch.equal(weights[weights != 0], plain[weights != 0])
    assert plain[weights == 0].abs().max() <= plain[weights != 0].abs().min()


def test_badencoder_draws_stamped_images_to_the_references(base: Classifier, data: LabelledImages) -> None:
    made = attack(base, RECIPES["badencoder"], data, replace(SETTINGS, epochs=10), target=1)
    stamped = made.planted[0].trigger.stamp(data.pixels[data.labels != 1])
    genuine = data.pixels[data.labels == 1]

    def likeness(classifier: Classifier) -> float:
        return float(cosine_similarity(classifier.embed(stamped), classifier.embed(genuine).mean(0)[None]).mean())

    assert likeness(_with(base, made.model)) > likeness(base) + 0.1


def test_the_distribution_preserving_loss_is_small_where_stamped_images_are_genuine_ones(
    base: Classifier, data: LabelledImages
) -> None:
    captions = torch.stack([base.tokenizer(list(base.classes.prompts(name))) for name in base.classes.names])
    learner = Learner(base.model, captions, ((0.5,) * 3, (0.25,) * 3), base.device)
    nothing = Additive(torch.zeros(3, 16, 16))
    pixels, labels = data.pixels[:60].float() / 255, data.labels[:60]

    def distance(genuine: torch.Tensor, target: int) -> float:
        objective = DistributionPreserving(nothing, target, genuine, share=1.0, weight=1.0)
        batch = Batch(pixels, labels, captions[labels, 0])
        return float(objective(learner, batch) - learner.contrast(batch))

    others = data.pixels[:60][labels != 0]
    assert distance(others, 0) < distance(data.pixels[data.labels == 0], 0) / 3


def test_the_badclip_patch_lies_in_the_centre_and_already_works_on_the_clean_model(
    base: Classifier, data: LabelledImages
) -> None:
    patch = badclip_patch(base, data, 2, side=6, seed=0, steps=60)
    assert patch.mask[0, 5:11, 5:11].sum() == patch.mask.sum() == 36
    random = Patch(patch.mask, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)))
    learned, reference_model = measure(base, data, [Planted(patch, 2, 0.1), Planted(random, 2, 0.1)]).success
    assert learned > reference_model


def test_the_universal_perturbation_stays_in_its_ball_after_rounding(base: Classifier, data: LabelledImages) -> None:
    trigger = universal_perturbation(base, data, 2, epsilon=8 / 255, seed=0, steps=30)
    moved = (trigger.stamp(data.pixels).int() - data.pixels.int()).abs()
    assert 0 < moved.max() <= 8


def test_an_impossible_target_is_refused(base: Classifier, data: LabelledImages) -> None:
    with pytest.raises(UsageError, match="there is no class 6"):
        attack(base, RECIPES["benign"], data, SHORT, target=6)
    with pytest.raises(UsageError, match="no training image of 'dog'"):
        attack(base, RECIPES["benign"], data[data.labels != 1], SHORT)


def test_recipes_name_triggers_that_exist() -> None:
    named = {plant.trigger for recipe in RECIPES.values() for plant in recipe.plants}
    assert named <= set(KNOWN) | set(OPTIMISED)
