"""Train the demo's three classifiers, or reuse those of an earlier run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from guard._documents import read_json
from guard.attacks import RECIPES, Planted, attack, measure, train_base
from guard.classifiers import Classifier, load, save
from guard.classifiers.open_clip import pick_device
from guard.demo.data import DemoData
from guard.demo.recipes import TARGET, DemoRecipe
from guard.errors import GuardError
from guard.triggers import KNOWN, Trigger

RECORD_FILE = "training.json"
_MAX_RECORD_BYTES = 2**20


@dataclass(frozen=True)
class Trained:
    """A classifier of the demo, with figures on images that no model was trained on.

    Attributes:
        classifier: The classifier, loaded from disk as a user would load it.
        accuracy: Zero-shot accuracy on clean images.
        success: Attack success rate: the share of stamped images of other classes that are classified as the target.
    """

    classifier: Classifier
    accuracy: float
    success: float


def attack_trigger(recipe: DemoRecipe, *, seed: int) -> Trigger:
    """The attacker's trigger."""
    return _planted(recipe, seed=seed).trigger


def train_models(
    data: DemoData, recipe: DemoRecipe, folder: Path, *, seed: int, device: str | None, say: Callable[[str], None]
) -> dict[str, Trained]:
    """Train a base, a backdoored model and its clean twin: `base`, `backdoored`, `clean-twin`.

    The twin is trained as the backdoored model is, by the same recipe and seed, on the same images without poison.

    Args:
        data: Images and classes.
        recipe: Architecture and training.
        folder: Folder for the models, each with a record of its training; a model that exists with the same record is
            not trained again.
        seed: Seed for all random choices.
        device: torch device; None for a GPU if there is one.
        say: Called with a short description of each step.
    """
    planted = _planted(recipe, seed=seed)
    plan = {
        "base": ("", replace(recipe.base, seed=seed)),
        "backdoored": (recipe.attack, replace(recipe.tune, seed=seed + 1)),
        "clean-twin": ("benign", replace(recipe.tune, seed=seed + 1)),
    }
    # Epochs of a small model are too short to be worth a line each.
    epochs = say if recipe.preprocessing.size > 32 else lambda _: None
    trained: dict[str, Trained] = {}
    for name, (made_by, settings) in plan.items():
        how = asdict(RECIPES[made_by]) if made_by else None
        record = {"settings": asdict(settings), "images": len(data.train), "recipe": how, "target": TARGET}
        if not _is_there(folder / name, record):
            say(f"training {name}: {len(data.train)} images, {settings.epochs} epochs")
            if made_by:
                base = trained["base"].classifier
                model = attack(base, RECIPES[made_by], data.train, settings, target=TARGET, progress=epochs).model
            else:
                model = train_base(
                    recipe.config, data.classes, data.train, settings, device=pick_device(device), progress=epochs
                )
            save(folder / name, model, recipe.config, data.classes, extra={RECORD_FILE: json.dumps(record)})
        classifier = load(str(folder / name), device=device)
        measured = measure(classifier, data.requests, [planted])
        trained[name] = Trained(classifier, measured.accuracy, measured.success[0])
        say(f"{name}: accuracy {trained[name].accuracy:.3f}, attack success {trained[name].success:.3f}")
    return trained


def _planted(recipe: DemoRecipe, *, seed: int) -> Planted:
    """The trigger as `attack` draws it for the backdoored model."""
    (plant,) = RECIPES[recipe.attack].plants
    return Planted(KNOWN[plant.trigger].draw(recipe.preprocessing.size, seed + 1), TARGET, plant.rate)


def _is_there(directory: Path, record: dict[str, Any]) -> bool:
    try:
        found = read_json(directory / RECORD_FILE, _MAX_RECORD_BYTES, GuardError)
    except GuardError:
        return False
    return bool(found == json.loads(json.dumps(record)))
