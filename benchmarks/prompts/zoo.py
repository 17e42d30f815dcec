"""The zoo of prompt learners on honest towers: tuned honestly in many ways, and attacked by many recipes.

Each part has a folder of its own; `benchmarks.prompts.examination` builds what it examines. `developed` serves to
choose with, the others to measure: they have other seeds, targets and triggers, `second` and `fourth` other towers
too, and `coloured` has fifty classes. The reference of prompt learners was chosen on `second` and `third`, so that
`fourth` is what measures it. Honest learners differ in kind, context, meta-net, rate, steps and images, so that
none is a later state of another.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.prompts.bases import COLOURED, CONFIG, Described, drawn, split, train_towers
from benchmarks.zoo.data import write as write_images
from guard._files import replace_directory, replace_file
from guard.attacks import LabelledImages, measure
from guard.attacks.prompts import PROMPT_RECIPES, PromptRecipe, attack_prompts
from guard.attacks.record import truth, write_truth
from guard.classifiers import Classifier, ClassList, load, save
from guard.classifiers.files import LEARNER_FILE
from guard.classifiers.prompts import PromptTuningSettings, save_prompt_learner
from guard.classifiers.tuning import TuningSettings
from guard.demo import digits
from guard.demo.data import DemoData

RENDERINGS, _BASE_STEPS, _BASE_BATCH = 6, 1500, 128
OWN = 800
"""Digits that towers and prompts are trained on; vetting, calibration and requests have others."""
_LENGTH = 4
_FORMAT, _IMAGES = 1, "described-digits"


@dataclass(frozen=True)
class Plan:
    """How many learners of a recipe there are, and how each is made.

    Attributes:
        count: Number of learners.
        rate: Share of the images that are stamped.
        radius: Radius of a learned trigger, in 255ths. To a linear model of the pixels 16 and 24 at 32 pixels are what
            2.3 and 3.4 are at 224.
        steps: Steps of the tuning.
        hidden: Width of the hidden layer of the meta-net.
        renderings: Pictures of each digit that are trained on.
        near_misses: Share of the images that have near misses of the trigger.
    """

    count: int
    rate: float
    radius: int = 0
    steps: int = 200
    hidden: int = 32
    renderings: int = 2
    near_misses: float = 0.0


_FIRST = {
    "cocoop-badclip-hidden": Plan(5, 0.3, 24),
    "cocoop-badclip-bai": Plan(2, 0.3, 16),
    "cocoop-sig": Plan(2, 0.15),
    "cocoop-badclip-adaptive": Plan(2, 0.25, 24, near_misses=0.25),
    "cocoop-siba-adaptive": Plan(1, 0.25, 24, near_misses=0.25),
    "cocoop-patch": Plan(1, 0.15),
    "cocoop-wanet": Plan(1, 0.15),
    "cocoop-blended": Plan(1, 0.15),
    "coop-badclip-hidden": Plan(1, 0.2, 24),
    "coop-sig": Plan(1, 0.15),
}
_LATER = {
    "cocoop-badclip-hidden": Plan(3, 0.3, 24),
    "cocoop-badclip-adaptive": Plan(2, 0.35, 24, steps=400, hidden=64, renderings=6, near_misses=0.15),
    "cocoop-sig": Plan(3, 0.15),
    "cocoop-badclip-bai": Plan(1, 0.2, 16, steps=400, hidden=64, renderings=6),
    "cocoop-siba-adaptive": Plan(1, 0.35, 24, steps=400, hidden=64, renderings=6, near_misses=0.15),
}
"""As on learners of the part `developed` the attacks took best."""


@dataclass(frozen=True)
class Part:
    """A part of the zoo.

    Attributes:
        towers: Seed of the towers, which all its learners share, as the users of one published CLIP do.
        seed: Seed that those of its learners follow from.
        honest: Number of honest learners.
        attacks: Recipe → how many of it, and how they are made.
        classes: Classes of a user.
    """

    towers: int
    seed: int
    honest: int
    attacks: Mapping[str, Plan]
    classes: ClassList = field(default=digits.CLASSES, repr=False)


PARTS: Mapping[str, Part] = {
    "developed": Part(900, 900, 4, _FIRST),
    "reported": Part(900, 901, 20, _FIRST),
    "second": Part(902, 920, 10, _LATER),
    "third": Part(900, 940, 10, _LATER),
    "fourth": Part(904, 980, 20, _LATER),
    "coloured": Part(900, 960, 1, {"cocoop-badclip-hidden": Plan(1, 0.3, 24)}, COLOURED),
}


@dataclass(frozen=True)
class Item:
    """One learner of the zoo: its name, how it is made, and on how many images of each class."""

    name: str
    recipe: PromptRecipe
    settings: PromptTuningSettings
    target: int
    renderings: int
    shots: int | None = None


def items(name: str) -> list[Item]:
    """The learners of a part, in an order in which every beginning has some of many kinds."""
    part = PARTS[name]
    found = list(_honest(part)) + list(_attacked(part))
    random.Random(part.seed).shuffle(found)  # noqa: S311 - repeatable, not secret
    return found


def _honest(part: Part) -> Iterator[Item]:
    for k in range(part.honest):
        seed = 10 * part.seed + k
        draw = random.Random(seed)  # noqa: S311 - repeatable, not secret
        kind = ("cocoop", "coop")[k % 2]
        tuning = TuningSettings(
            steps=draw.choice((60, 80, 120)),
            batch=draw.choice((12, 16)),
            learning_rate=draw.choice((2e-3, 5e-3, 1e-2)),
            weight_decay=draw.choice((0.0, 5e-4)),
            seed=seed,
        )
        settings = PromptTuningSettings(
            words=draw.choice(("a photo of the digit", "")),
            length=draw.choice((4, 8)),
            hidden=draw.choice((8, 32, 64)),
            tuning=tuning,
        )
        yield Item(f"{kind}-benign-{k}", PROMPT_RECIPES[f"{kind}-benign"], settings, 0, 2, draw.choice((None, 64, 16)))


def _attacked(part: Part) -> Iterator[Item]:
    for k, (name, plan) in enumerate(part.attacks.items()):
        recipe = PROMPT_RECIPES[name]
        for repeat in range(plan.count):
            seed = 10 * part.seed + 100 + 20 * repeat + k
            warm_up = 150 if recipe.hidden else 0
            own = replace(
                recipe, epsilon=plan.radius / 255, warm_up=warm_up, rate=plan.rate, near_misses=plan.near_misses
            )
            tuning = TuningSettings(steps=plan.steps, batch=32, learning_rate=1e-2, weight_decay=0.0, seed=seed)
            settings = PromptTuningSettings(words="", length=_LENGTH, hidden=plan.hidden, tuning=tuning)
            target = (3 * k + 5 * repeat + part.seed) % len(part.classes.names)
            yield Item(f"{name}-{repeat}", own, settings, target, plan.renderings)


@dataclass(frozen=True, eq=False)
class Sets:
    """The images of a part.

    Attributes:
        towers: What the towers are trained on.
        user: The sets of a user, of whose `train` learners see some renderings.
        pool: More pictures of the digits that vetting has: uint8, shape [N, 3, H, W].
    """

    towers: Described
    user: DemoData
    pool: Tensor


@lru_cache(maxsize=2)
def sets_of(part: str) -> Sets:
    """Draw the images of a part."""
    whole = drawn(RENDERINGS, seed=PARTS[part].towers)
    own = whole[torch.from_numpy((whole.original < OWN).nonzero()[0])]
    return Sets(own, *split(whole, PARTS[part].classes, RENDERINGS))


def towers_of(part: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The folder of a part's towers, which are trained if they are not there."""
    path = folder / "models" / f"towers-{PARTS[part].towers}"
    if not path.exists():
        model = train_towers(
            sets_of(part).towers, steps=_BASE_STEPS, batch=_BASE_BATCH, seed=PARTS[part].towers, progress=say
        )
        save(path, model, CONFIG, PARTS[part].classes)
    return path


def make(part: str, item: Item, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a learner, if it is not there, and return what is known of it."""
    path = folder / "truth" / f"{item.name}.json"
    if not path.exists():
        towers = load(str(towers_of(part, folder, say)), device="cpu", classes=PARTS[part].classes)
        _make(item, towers, sets_of(part), folder / "models" / item.name, path)
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return known


def _make(item: Item, towers: Classifier, sets: Sets, folder: Path, path: Path) -> None:
    made = attack_prompts(towers, item.recipe, _some(sets, item), item.settings, target=item.target)
    save(folder, towers.model, CONFIG, towers.classes)
    save_prompt_learner(folder / LEARNER_FILE, made.classifier.learner)
    found, there = (measure(model, sets.user.requests, made.planted) for model in (made.classifier, towers))
    known = {
        **truth(made.planted, found, there.accuracy),
        "recipe": item.recipe.family,
        "family": item.recipe.family,
        "kind": item.recipe.kind,
        "adaptive": item.recipe.adaptive,
        "seed": item.settings.tuning.seed,
        "towers": {"accuracy": there.accuracy, "successes": list(there.success)},
        "seconds": round(made.seconds, 1),
    }
    write_truth(path, known, made.planted)


def write_list(part: str, folder: Path) -> None:
    """Make the folder a zoo as docs/zoo.md describes it: write its images and the list of the models that are there."""
    if not (folder / "images" / _IMAGES).exists():
        with replace_directory(folder / "images" / _IMAGES, marker="vetting") as temporary:
            write_images(sets_of(part).user, temporary)
    entry = {"base": f"towers-{PARTS[part].towers}", "images": _IMAGES}
    models = {path.stem: entry for path in sorted((folder / "truth").glob("*.json"))}
    document = {"format": _FORMAT, "name": "prompts", "seed": PARTS[part].seed, "models": models}
    replace_file(folder / "zoo.json", (json.dumps(document, indent=1) + "\n").encode())


def _some(sets: Sets, item: Item) -> LabelledImages:
    """Some images of each class, drawn by the seed of the learner."""
    images = sets.user.train[: item.renderings * OWN]
    if item.shots is None:
        return images
    order = np.random.default_rng(item.settings.tuning.seed).permutation(len(images))
    labels = images.labels.numpy()
    rows = np.concatenate([order[labels[order] == k][: item.shots] for k in range(int(labels.max()) + 1)])
    return images[torch.from_numpy(rows)]
