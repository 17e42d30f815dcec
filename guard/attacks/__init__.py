"""Poison a classifier on purpose, for evaluation, and train its clean counterparts."""

from guard.attacks.attack import Attacked, Planted, attack, poisoned
from guard.attacks.measuring import Measured, measure
from guard.attacks.recipes import RECIPES, Plant, Recipe
from guard.attacks.record import truth, write_truth
from guard.attacks.training import LabelledImages, TrainingSettings, train, train_base

__all__ = [
    "RECIPES",
    "Attacked",
    "LabelledImages",
    "Measured",
    "Plant",
    "Planted",
    "Recipe",
    "TrainingSettings",
    "attack",
    "measure",
    "poisoned",
    "train",
    "train_base",
    "truth",
    "write_truth",
]
