"""Prompt learners: learned contexts and visual prompts on frozen towers."""

from guard.classifiers.prompts.files import load_prompt_learner, save_prompt_learner
from guard.classifiers.prompts.learner import Kind, PromptLearner
from guard.classifiers.prompts.pickles import convert_prompt_learner
from guard.classifiers.prompts.prompted import PromptedClassifier
from guard.classifiers.prompts.training import PromptTuningSettings, tune_prompts

__all__ = [
    "Kind",
    "PromptLearner",
    "PromptTuningSettings",
    "PromptedClassifier",
    "convert_prompt_learner",
    "load_prompt_learner",
    "save_prompt_learner",
    "tune_prompts",
]
