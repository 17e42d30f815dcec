"""Small text towers, attacked and not, made by code."""

from functools import cache
from typing import Any

import torch

from guard.attacks import TEXT_RECIPES, AttackedText, TextTuningSettings, attack_text
from guard.classifiers import Classifier, ClassList, Preprocessing
from guard.classifiers.open_clip import import_open_clip, quiet
from guard.vetting import ordinary_prompts

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
PROMPTS = ordinary_prompts(300, seed=3)


def text_classifier(seed: int = 0, **changes: Any) -> Classifier:
    """An untrained CLIP with a small text tower; `changes` are to its `text_cfg`, and make it a `CustomTextCLIP`."""
    open_clip = import_open_clip()
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if changes else open_clip.CLIP
    config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": {**TEXT, **changes}}
    with quiet():
        model = kind(**config)
    return Classifier(
        model,
        config,
        open_clip.SimpleTokenizer(context_length=TEXT["context_length"]),
        Preprocessing(16, (0.5,) * 3, (0.25,) * 3),
        ClassList(("cat", "dog", "ship", "truck", "frog", "bird"), ("a photo of a {}.",)),
        source="small text tower",
        device=torch.device("cpu"),
    )


@cache
def base() -> Classifier:
    """A base, made once; nobody changes it."""
    return text_classifier()


@cache
def trained(recipe: str, steps: int = 40, seed: int = 0) -> AttackedText:
    """A copy of the base trained by a recipe, made once."""
    settings = TextTuningSettings(steps=steps, batch=16, learning_rate=2e-3, seed=seed)
    return attack_text(base(), TEXT_RECIPES[recipe], PROMPTS, settings, target_text="a white teapot")
