"""Build a zoo of prompt learners on honest towers: tuned honestly in many ways, and attacked by every recipe.

    python -m benchmarks.prompts.zoo --part developed|reported --out ZOO [--only PATTERN]

builds what is missing. `developed` serves to choose with, `reported` to measure: they share the towers, and have other
seeds, targets and triggers. Honest learners differ in kind, context, meta-net, rate, steps and images, so that none is
a later state of another.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.prompts.bases import CONFIG, Described, drawn, split, train_towers
from benchmarks.zoo.data import write as write_images
from guard._files import replace_directory, replace_file
from guard.attacks import LabelledImages, measure
from guard.attacks.prompts import PROMPT_RECIPES, PromptRecipe, attack_prompts
from guard.attacks.record import truth, write_truth
from guard.classifiers import Classifier, load, save
from guard.classifiers.files import LEARNER_FILE
from guard.classifiers.prompts import PromptTuningSettings, save_prompt_learner
from guard.classifiers.tuning import TuningSettings
from guard.demo import digits
from guard.demo.data import DemoData

PARTS = {"developed": 900, "reported": 901}
"""The parts of the zoo, each with the seed that those of its learners follow from."""
TOWERS = 900
"""Seed of the towers, which all learners share, as the users of one published CLIP do."""
RENDERINGS, _BASE_STEPS, _BASE_BATCH = 6, 1500, 128
_OWN = 800
"""Digits that towers and prompts are trained on; vetting, calibration and requests have others."""
_FORMAT, _IMAGES = 1, "described-digits"
_ATTACKS = {
    "cocoop-badclip-hidden": (5, 0.3, 24),
    "cocoop-badclip-bai": (2, 0.3, 16),
    "cocoop-sig": (2, 0.15, 0),
    "cocoop-badclip-adaptive": (2, 0.25, 24),
    "cocoop-siba-adaptive": (1, 0.25, 24),
    "cocoop-patch": (1, 0.15, 0),
    "cocoop-wanet": (1, 0.15, 0),
    "cocoop-blended": (1, 0.15, 0),
    "coop-badclip-hidden": (1, 0.2, 24),
    "coop-sig": (1, 0.15, 0),
}
"""How many learners of each recipe the reported part has, the share of images that are stamped, and the radius of a
learned trigger in 255ths. To a linear model of the pixels 16 and 24 at 32 pixels are what 2.3 and 3.4 are at 224."""
ATTACKED = TuningSettings(steps=200, batch=32, learning_rate=1e-2, weight_decay=0.0)
_HIDDEN, _LENGTH = 32, 4


@dataclass(frozen=True)
class Item:
    """One learner of the zoo: its name, how it is made, and on how many images of each class."""

    name: str
    recipe: PromptRecipe
    settings: PromptTuningSettings
    target: int
    shots: int | None = None


def items(part: str) -> list[Item]:
    """The learners of a part, in an order in which every beginning has some of many kinds."""
    found = list(_honest(part)) + list(_attacked(part))
    random.Random(PARTS[part]).shuffle(found)  # noqa: S311 - repeatable, not secret
    return found


def _honest(part: str) -> Iterator[Item]:
    for k in range(20 if part == "reported" else 4):
        seed = 10 * PARTS[part] + k
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
        yield Item(f"{kind}-benign-{k}", PROMPT_RECIPES[f"{kind}-benign"], settings, 0, draw.choice((None, 64, 16)))


def _attacked(part: str) -> Iterator[Item]:
    for k, (name, (count, rate, radius)) in enumerate(_ATTACKS.items()):
        recipe = PROMPT_RECIPES[name]
        for repeat in range(count if part == "reported" else 1):
            seed = 10 * PARTS[part] + 100 + 20 * repeat + k
            own = replace(recipe, epsilon=radius / 255, warm_up=150 if recipe.hidden else 0, rate=rate)
            settings = PromptTuningSettings(
                words="", length=_LENGTH, hidden=_HIDDEN, tuning=replace(ATTACKED, seed=seed)
            )
            yield Item(f"{name}-{repeat}", own, settings, (3 * k + 5 * repeat + PARTS[part]) % 10)


def data_of() -> tuple[Described, DemoData]:
    """What towers are trained on, and the sets of a user."""
    whole = drawn(RENDERINGS, seed=TOWERS)
    rows = torch.from_numpy((whole.original < _OWN).nonzero()[0])
    return Described(whole.images[rows], whole.attributes[rows], whole.original[rows.numpy()]), split(whole, RENDERINGS)


def build(part: str, folder: Path, only: str) -> None:
    """Train what is missing."""
    described, data = data_of()
    if not (folder / "images" / _IMAGES).exists():
        with replace_directory(folder / "images" / _IMAGES, marker="vetting") as temporary:
            write_images(data, temporary)
    base = f"towers-{TOWERS}"
    if not (folder / "models" / base).exists():
        model = train_towers(described, steps=_BASE_STEPS, batch=_BASE_BATCH, seed=TOWERS, progress=_say)
        save(folder / "models" / base, model, CONFIG, digits.CLASSES)
    towers = load(str(folder / "models" / base), device="cpu")
    for item in items(part):
        path = folder / "truth" / f"{item.name}.json"
        if fnmatchcase(item.name, only) and not path.exists():
            _make(item, towers, data, folder / "models" / item.name, path)
        _list(part, folder, base)


def _make(item: Item, towers: Classifier, data: DemoData, folder: Path, path: Path) -> None:
    made = attack_prompts(towers, item.recipe, _few(data.train, item), item.settings, target=item.target)
    save(folder, towers.model, CONFIG, towers.classes)
    save_prompt_learner(folder / LEARNER_FILE, made.classifier.learner)
    found, there = (measure(model, data.requests, made.planted) for model in (made.classifier, towers))
    known = {
        **truth(made.planted, found, there.accuracy),
        "recipe": item.recipe.family,
        "family": item.recipe.family,
        "kind": item.recipe.kind,
        "adaptive": item.recipe.adaptive,
        "seed": item.settings.tuning.seed,
        "towers": {"accuracy": there.accuracy, "successes": list(there.success)},
        "seconds": round(made.seconds, 1),
        "digest": load(str(folder), device="cpu").digest.root,
    }
    write_truth(path, known, made.planted)
    _say(f"{item.name}: {known['label']}, accuracy {found.accuracy:.3f}, success {found.success}")


def _few(images: LabelledImages, item: Item) -> LabelledImages:
    """Some images of each class, drawn by the seed of the learner."""
    if item.shots is None:
        return images
    order = np.random.default_rng(item.settings.tuning.seed).permutation(len(images))
    labels = images.labels.numpy()
    rows = np.concatenate([order[labels[order] == k][: item.shots] for k in range(int(labels.max()) + 1)])
    return images[torch.from_numpy(rows)]


def _list(part: str, folder: Path, base: str) -> None:
    """Write the list of the models that are there."""
    there = sorted(path.stem for path in (folder / "truth").glob("*.json"))
    models: dict[str, Any] = {name: {"base": base, "images": _IMAGES} for name in there}
    document = {"format": _FORMAT, "name": "prompts", "seed": PARTS[part], "models": models}
    replace_file(folder / "zoo.json", (json.dumps(document, indent=1) + "\n").encode())


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="*", help="Shell pattern of the names of the learners.")
    arguments = parser.parse_args()
    build(arguments.part, arguments.out, arguments.only)


if __name__ == "__main__":
    main()
