"""Poison a classifier on purpose, for evaluation, and train its clean counterparts."""

from guard.attacks.attack import Attacked, attack, poisoned
from guard.attacks.covers import Cover
from guard.attacks.measuring import Covered, Measured, measure
from guard.attacks.planted import Planted
from guard.attacks.recipes import RECIPES, Plant, Recipe
from guard.attacks.record import truth, write_truth
from guard.attacks.training import LabelledImages, TrainingSettings, train, train_base

__all__ = [
    "RECIPES",
    "Attacked",
    "Cover",
    "Covered",
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
