"""Train the demo's three classifiers, or take those of an earlier run."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from guard.attacks import LabelledImages, Poison, TrainingSettings, poisoned, train
from guard.classifiers import Classifier, load, save
from guard.classifiers.loading import import_open_clip, pick_device
from guard.demo.data import DemoData
from guard.demo.recipes import MEAN, STD, TARGET, DemoRecipe
from guard.triggers import Patch, Trigger

RECORD_FILE = "training.json"


@dataclass(frozen=True)
class Trained:
    """A classifier of the demo, and what it does on images that nothing was trained on.

    Attributes:
        classifier: Loaded from disk, as a user would.
        accuracy: Zero-shot accuracy on clean images.
        success: Share of stamped images of other classes that go to the target.
    """

    classifier: Classifier
    accuracy: float
    success: float


def attack_trigger(recipe: DemoRecipe, *, seed: int) -> Trigger:
    """The attacker's trigger."""
    return Patch.badnets(recipe.preprocessing.size, recipe.patch, seed=seed + 1)


def train_models(
    data: DemoData, recipe: DemoRecipe, folder: Path, *, seed: int, device: str | None, say: Callable[[str], None]
) -> dict[str, Trained]:
    """A base, a backdoored model and its clean twin: `base`, `backdoored`, `clean-twin`.

    The twin is trained as the backdoored model is, by the same recipe and seed, on the same images without poison.

    Args:
        data: Images and classes.
        recipe: Architecture and training.
        folder: The models are written here, each with a record of its training; one that is there already, with the
            same record, is not trained again.
        seed: Of everything.
        device: torch device.
        say: Told what happens.
    """
    trigger = attack_trigger(recipe, seed=seed)
    poison = Poison(trigger, TARGET, recipe.rate)
    where = pick_device(device)
    torch.manual_seed(seed)
    base = import_open_clip().CLIP(
        recipe.architecture["embed_dim"], recipe.architecture["vision_cfg"], recipe.architecture["text_cfg"]
    )
    plan: list[tuple[str, TrainingSettings, LabelledImages]] = [
        ("base", replace(recipe.base, seed=seed), data.train),
        ("backdoored", replace(recipe.tune, seed=seed + 1), poisoned(data.train, poison, seed=seed)),
        ("clean-twin", replace(recipe.tune, seed=seed + 1), data.train),
    ]
    trained: dict[str, Trained] = {}
    for name, settings, images in plan:
        rate = recipe.rate if name == "backdoored" else 0.0
        record = {"settings": asdict(settings), "images": len(images), "poison_rate": rate, "target": TARGET}
        if not _is_there(folder / name, record):
            say(f"training {name}: {len(images)} images, {settings.epochs} epochs")
            model = base if name == "base" else copy.deepcopy(_weights(base, folder / "base", device))
            _train(model, recipe, data, images, settings, where, say)
            save(folder / name, model, recipe.config, data.classes, extra={RECORD_FILE: json.dumps(record)})
        classifier = load(str(folder / name), device=device)
        trained[name] = _measure(classifier, data.requests, trigger)
        say(f"{name}: accuracy {trained[name].accuracy:.3f}, attack success {trained[name].success:.3f}")
    return trained


def _is_there(directory: Path, record: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((directory / RECORD_FILE).read_text(encoding="utf-8")) == json.loads(json.dumps(record)))
    except (OSError, ValueError):
        return False


def _weights(model: torch.nn.Module, directory: Path, device: str | None) -> torch.nn.Module:
    model.load_state_dict(load(str(directory), device=device).model.state_dict())
    return model.requires_grad_(requires_grad=True)


def _train(
    model: torch.nn.Module,
    recipe: DemoRecipe,
    data: DemoData,
    images: LabelledImages,
    settings: TrainingSettings,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    tokenizer = import_open_clip().SimpleTokenizer(context_length=recipe.architecture["text_cfg"]["context_length"])
    slow = recipe.preprocessing.size > 32
    train(
        model, tokenizer, data.classes, (MEAN, STD), images, settings, device=device,
        progress=say if slow else lambda _: None,
    )  # fmt: skip


def _measure(classifier: Classifier, images: LabelledImages, trigger: Trigger) -> Trained:
    predicted = classifier.predict(classifier.embed(images.pixels))
    others = images.pixels[images.labels != TARGET]
    stamped = classifier.predict(classifier.embed(trigger.stamp(others)))
    return Trained(
        classifier,
        float((predicted == images.labels).float().mean()),
        float((stamped == TARGET).float().mean()),
    )
