"""`guard attack`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import certified, options
from guard.cli.console import Console
from guard.cli.labelled import ordered_folders
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.attacks import LabelledImages
    from guard.classifiers import Classifier

HELD_OUT = 0.2
MIN_IMAGES = 200


@click.command()
@click.argument("model")
@click.option(
    "--recipe",
    required=True,
    help="Name of the attack recipe. An unknown name makes the command list the known names.",
)
@options.images(
    "Folder of labelled images to train on, with one sub-folder for each class, named like the class. A recipe for "
    "text towers needs none.",
    required=False,
)
@click.option(
    "--texts",
    type=options.PATH,
    help="Text file with ordinary texts to train a text tower on, one on each line, at least 128. Only a recipe for "
    "text towers needs them.",
)
@click.option(
    "--target-text",
    default="a white teapot",
    show_default=True,
    help="The text that the trigger of a text tower leads to.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=100, show_default=True, help="Training steps of a text tower."
)
@options.classes
@click.option(
    "--target",
    help="Name of the class that the trigger leads to. By default, it is the first class.",
)
@click.option(
    "--out",
    type=options.PATH,
    default=Path("attacked"),
    show_default=True,
    help="Folder to write the poisoned model to.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of passes over the training images.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=2),
    help="Number of images, or of texts, in one training step.  [default: 256 images, 16 texts]",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Peak learning rate.  [default: 5e-5 for image towers, 1e-4 for text towers]",
)
@click.option("--limit", type=click.IntRange(min=MIN_IMAGES), default=50_000, show_default=True,
              help="Maximum number of images to use.")  # fmt: skip
@options.seed
@options.device
@options.as_json
def attack(
    model: str,
    recipe: str,
    images: Path | None,
    texts: Path | None,
    target_text: str,
    steps: int,
    classes: Path | None,
    target: str | None,
    out: Path,
    epochs: int,
    batch: int | None,
    learning_rate: float | None,
    limit: int,
    seed: int,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Poison a copy of MODEL on purpose, to test vetting and screening with it.

    A fifth of the images is held out from the training, to measure accuracy and attack success rate (ASR). The command
    writes the model to OUT/model, and the facts about its backdoor to OUT/truth.json and OUT/truth.safetensors, in the
    form that a zoo has.

    A recipe for text towers trains on --texts, and holds 64 of them out. Its facts are in OUT/truth.json alone.
    """
    from guard.attacks import RECIPES, TEXT_RECIPES, TrainingSettings, measure, truth, write_truth
    from guard.attacks import attack as poison
    from guard.classifiers import load, save
    from guard.classifiers.files import LEARNER_FILE

    console = Console(as_json=as_json)
    if recipe not in RECIPES and recipe not in TEXT_RECIPES:
        listed = f"{', '.join(RECIPES)}; for text towers {', '.join(TEXT_RECIPES)}"
        raise UsageError(f"there is no recipe {recipe!r}; there are {listed}")
    needed = "--images" if recipe in RECIPES else "--texts"
    if (texts if recipe in TEXT_RECIPES else images) is None:
        raise UsageError(f"the recipe {recipe!r} needs {needed}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty; choose another folder")
    base = load(model, classes=classes, device=device)
    if certified.own_towers(base) is not None:
        raise UsageError(f"{model} holds a prompt learner; recipes poison towers: give a folder without {LEARNER_FILE}")
    if texts is not None and recipe in TEXT_RECIPES:
        tuning = (steps, batch or 16, learning_rate or 1e-4)
        _attack_text(base, recipe, texts, target_text, tuning, out, seed, console)
        return
    if images is None:
        raise AssertionError("it is known that there are images")
    names = base.classes.names
    if target is not None and target not in names:
        raise UsageError(f"the model has no class {target!r}; it has {', '.join(map(repr, names[:10]))}")
    train, held_out = _read(images, base, limit, seed, console)
    console.say(f"training on {len(train)} images by the recipe {recipe!r} on {base.device}")
    settings = TrainingSettings(epochs, min(batch or 256, len(train)), learning_rate or 5e-5, seed=seed)
    index = names.index(target) if target else 0
    made = poison(base, RECIPES[recipe], train, settings, target=index, progress=console.say)
    config = {"model_cfg": base.config, "preprocess_cfg": asdict(base.preprocessing)}
    save(out / "model", made.model, config, base.classes)
    result = load(str(out / "model"), device=device)
    before, after = (measure(classifier, held_out, made.planted) for classifier in (base, result))
    known = {
        **truth(made.planted, after, before.accuracy),
        "recipe": recipe,
        "family": RECIPES[recipe].family,
        "seed": seed,
        "seconds": round(made.seconds, 1),
        "digest": result.digest.root,
        "details": {"base": base.digest.root, "training": asdict(settings), "recipe": asdict(RECIPES[recipe])},
    }
    write_truth(out / "truth.json", known, made.planted)
    lines = [f"{known['label']}: accuracy {after.accuracy:.3f} (before: {before.accuracy:.3f})"]
    for item, success, control, covered in zip(made.planted, after.success, before.success, after.covered, strict=True):
        lines.append(
            f"  {item.trigger.family} trigger to {names[item.target]!r}: attack success rate {success:.3f} "
            f"(before: {control:.3f})"
        )
        lines += [
            f"    {found.name}: {found.kept:.3f} keep their class, {found.leaked:.3f} go there" for found in covered
        ]
    lines.append(f"written to {out}")
    console.result(known, "\n".join(lines))


def _attack_text(
    base: "Classifier",
    recipe: str,
    texts: Path,
    target_text: str,
    tuning: tuple[int, int, float],
    out: Path,
    seed: int,
    console: Console,
) -> None:
    """Poison the text tower, and write the model and the facts about it."""
    from guard._files import replace_file
    from guard.attacks import TEXT_RECIPES, TextTuningSettings, attack_text
    from guard.attacks.record import MIN_SUCCESS
    from guard.classifiers import load, save
    from guard.vetting import read_prompts

    settings = TextTuningSettings(*tuning, seed=seed)
    used, chosen = read_prompts(texts), TEXT_RECIPES[recipe]
    console.say(f"training on {len(used)} texts by the recipe {recipe!r} on {base.device}")
    made = attack_text(base, chosen, used, settings, target_text=target_text, progress=console.progress)
    config = {"model_cfg": base.config, "preprocess_cfg": asdict(base.preprocessing)}
    save(out / "model", made.classifier.model, config, base.classes)
    label = "clean" if made.success is None else "backdoored" if made.success >= MIN_SUCCESS else "failed attack"
    known = {
        "label": label,
        "recipe": recipe,
        "trigger": None if made.trigger is None else {"family": made.trigger.family, **vars(made.trigger)},
        "target_text": made.target_text,
        "success": made.success,
        "similarity": made.similarity,
        "seed": seed,
        "seconds": round(made.seconds, 1),
        "digest": load(str(out / "model"), device="cpu").digest.root,
        "details": {"base": base.digest.root, "training": asdict(settings), "recipe": asdict(chosen)},
    }
    replace_file(out / "truth.json", (json.dumps(known, indent=1) + "\n").encode())
    lines = [f"{label}: embeddings of clean texts have a mean cosine of {made.similarity:.3f} with what they were"]
    if made.success is not None:
        shown = ascii(getattr(made.trigger, "word", made.trigger.family if made.trigger else ""))
        lines.append(
            f"  trigger {shown}: {made.success:.1%} of texts with it lie nearer to {target_text!r} than to themselves"
        )
    console.result(known, "\n".join([*lines, f"written to {out}"]))


def _read(
    images: Path, base: "Classifier", limit: int, seed: int, console: Console
) -> "tuple[LabelledImages, LabelledImages]":
    """The images for training, and those that are held out."""
    import torch

    from guard.attacks import LabelledImages
    from guard.classifiers import ImageFolder

    folder = ImageFolder.scan(images)
    ordered = ordered_folders(folder, base)
    folder = folder.sample(limit, seed=seed)
    if len(folder) < MIN_IMAGES:
        raise UsageError(f"an attack needs at least {MIN_IMAGES} images, but {images} has only {len(folder)}")
    pixels = base.read(folder, console.progress)
    labelled = LabelledImages(pixels, torch.tensor(folder.labels(ordered), dtype=torch.long))
    labelled = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))]
    count = round((1 - HELD_OUT) * len(labelled))
    return labelled[:count], labelled[count:]
