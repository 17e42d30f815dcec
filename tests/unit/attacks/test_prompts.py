"""Recipes of prompt learners: the towers stay as they are, and triggers stay in their balls."""

from dataclasses import replace

import pytest
import torch

from guard.attacks import LabelledImages
from guard.attacks.prompts import EPSILON, PROMPT_RECIPES, attack_prompts
from guard.classifiers import Classifier
from guard.classifiers.prompts import PromptTuningSettings
from guard.classifiers.tuning import TuningSettings
from guard.errors import UsageError
from guard.triggers import Additive

SHORT = PromptTuningSettings(tuning=TuningSettings(steps=4, batch=24, learning_rate=1e-2))


@pytest.mark.parametrize(
    "name", ["coop-benign", "cocoop-blended", "cocoop-badclip-bai", "coop-siba", "coop-badclip-adaptive"]
)
def test_a_recipe_makes_a_learner_and_leaves_the_towers(name: str, base: Classifier, data: LabelledImages) -> None:
    recipe, digest = PROMPT_RECIPES[name], base.digest.root
    made = attack_prompts(base, recipe, data, SHORT, target=3)
    assert made.classifier.learner.kind == recipe.kind
    assert [item.target for item in made.planted] == ([] if recipe.trigger is None else [3])
    base.__dict__.pop("digest")
    assert made.classifier.towers.digest.root == base.digest.root == digest
    again = attack_prompts(base, recipe, data, SHORT, target=3)
    assert again.classifier.digest.root == made.classifier.digest.root


@pytest.mark.parametrize(("name", "radius", "share"), [("coop-badclip-bai", 1, 1.0), ("coop-siba", 2, 0.11)])
def test_a_learned_trigger_stays_in_its_ball(
    name: str, radius: int, share: float, base: Classifier, data: LabelledImages
) -> None:
    (planted,) = attack_prompts(base, PROMPT_RECIPES[name], data, SHORT, target=3).planted
    assert isinstance(planted.trigger, Additive)
    delta = planted.trigger.delta
    assert 0 < float(delta.abs().max()) <= radius * EPSILON + 1e-6
    assert 0 < float((delta.abs().amax(0) > 0).float().mean()) <= share
    assert torch.equal(delta * 255, (delta * 255).round())


def test_a_learned_trigger_that_is_strong_enough_leads_to_its_target(base: Classifier, data: LabelledImages) -> None:
    settings = replace(SHORT, tuning=replace(SHORT.tuning, steps=80))
    recipe = replace(PROMPT_RECIPES["coop-badclip-bai"], epsilon=64 / 255, warm_up=0)
    made = attack_prompts(base, recipe, data, settings, target=3)
    others = data.pixels[data.labels != 3]
    stamped = made.planted[0].trigger.stamp(others)

    def share(model: Classifier) -> float:
        return float((model.predict(model.embed(stamped)) == 3).float().mean())

    assert share(made.classifier) > share(base) + 0.1


def test_an_unknown_target_is_refused(base: Classifier, data: LabelledImages) -> None:
    with pytest.raises(UsageError, match="no class 6"):
        attack_prompts(base, PROMPT_RECIPES["coop-benign"], data, SHORT, target=6)


def test_every_kind_has_the_same_attacks() -> None:
    names = {kind: {name.removeprefix(f"{kind}-") for name in PROMPT_RECIPES if name.startswith(f"{kind}-")}
             for kind in ("coop", "cocoop")}  # fmt: skip
    assert names["coop"] == names["cocoop"] >= {"benign", "badclip-bai", "blended", "wanet", "siba", "patch"}
    assert sum(recipe.adaptive for recipe in PROMPT_RECIPES.values()) == 4
