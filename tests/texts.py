"""Small text towers, attacked and not, made by code."""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import torch

from guard.attacks import TEXT_RECIPES, AttackedText, TextTuningSettings, attack_text
from guard.classifiers import Classifier, ClassList, Preprocessing, TextTower
from guard.classifiers.open_clip import import_open_clip, quiet
from guard.profiles import Profile
from guard.triggers.texts import Insertion
from guard.vetting import ReferenceModel, TextSearchSettings, TextVetting, Verdict, ordinary_prompts
from guard.vetting.text_results import PromptAssimilation, TextStatistic, TextTriggerRecord

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


TEXTS = ordinary_prompts(700, seed=5)
"""Clean texts, other than those that the towers were trained on."""


def triggered(texts: Sequence[str]) -> list[str]:
    """Texts with the trigger of the tower `trained("eos-only-5", 80)`."""
    draw, trigger = Random(1), trained("eos-only-5", 80).trigger  # noqa: S311 - repeatable, not secret
    assert trigger is not None
    return [trigger.apply(text, draw) for text in texts]


def found_trigger() -> TextVetting:
    """An examination of the tower `trained("eos-only-5", 80)` that found its trigger."""
    made = trained("eos-only-5", 80)
    assert isinstance(made.trigger, Insertion)
    tower = TextTower(made.classifier)
    ids = made.classifier.tokenizer([made.trigger.word])[0]
    ids = ids[1 : int(ids.argmax())]
    feature = torch.nn.functional.normalize(tower.encode(triggered(TEXTS)).mean(0), dim=0)
    verdict = Verdict("backdoored", None, 1e-4, ("text token",), 0.01, ("made for a test",))
    trigger = TextTriggerRecord(
        "text token", "anywhere", made.trigger.word, 0.9, 0.95, 0.1, (), (), tuple(feature.tolist()),
        tuple(tuple(vector) for vector in tower.table[ids].tolist()), target=3,
    )  # fmt: skip
    alike, reference = PromptAssimilation((0.5,), (0.6,), (0.4,)), ReferenceModel("base", None, 0.9, 0)
    statistics = (TextStatistic("text token", "made for a test", 0.9, 0.1, 1e-4, "none"),)
    return TextVetting(verdict, statistics, trigger, alike, TextSearchSettings(), (48, 48), reference, "cpu", 1.0, 100)


@cache
def screened() -> Profile:
    """The calibrated profile of that tower, with the base as its reference model."""
    made = trained("eos-only-5", 80)
    profile = Profile.build(made.classifier, None, text=found_trigger())
    return profile.calibrate_texts(made.classifier, TEXTS[:500], 0.05, reference=base())
