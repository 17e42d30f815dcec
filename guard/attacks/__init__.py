"""Poison a classifier on purpose, for evaluation; and train its clean twin."""

from guard.attacks.training import LabelledImages, Poison, TrainingSettings, poisoned, train

__all__ = ["LabelledImages", "Poison", "TrainingSettings", "poisoned", "train"]
