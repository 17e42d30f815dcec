"""Poison a classifier on purpose, for evaluation, and train its clean counterparts."""

from guard.attacks.attack import Attacked, attack, poisoned
from guard.attacks.covers import Cover
from guard.attacks.measuring import Covered, Measured, measure
from guard.attacks.planted import Planted
from guard.attacks.recipes import RECIPES, Plant, Recipe
from guard.attacks.record import truth, write_truth
from guard.attacks.text_attack import AttackedText, TextTuningSettings, attack_text, target_of
from guard.attacks.text_recipes import TEXT_RECIPES, TextRecipe
from guard.attacks.training import LabelledImages, TrainingSettings, train, train_base

__all__ = [
    "RECIPES",
    "TEXT_RECIPES",
    "Attacked",
    "AttackedText",
    "Cover",
    "Covered",
    "LabelledImages",
    "Measured",
    "Plant",
    "Planted",
    "Recipe",
    "TextRecipe",
    "TextTuningSettings",
    "TrainingSettings",
    "attack",
    "attack_text",
    "measure",
    "poisoned",
    "target_of",
    "train",
    "train_base",
    "truth",
    "write_truth",
]
