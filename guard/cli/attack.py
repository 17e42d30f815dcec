"""`guard attack`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import options
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
@options.images("Folder of labelled images to train on, with one sub-folder for each class, named like the class.")
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
    "--batch", type=click.IntRange(min=2), default=256, show_default=True, help="Number of images in one training step."
)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=5e-5, show_default=True,
              help="Peak learning rate of the one-cycle schedule.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=MIN_IMAGES), default=50_000, show_default=True,
              help="Maximum number of images to use.")  # fmt: skip
@options.seed
@options.device
@options.as_json
def attack(
    model: str,
    recipe: str,
    images: Path,
    classes: Path | None,
    target: str | None,
    out: Path,
    epochs: int,
    batch: int,
    learning_rate: float,
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
    """
    from guard.attacks import RECIPES, TrainingSettings, measure, truth, write_truth
    from guard.attacks import attack as poison
    from guard.classifiers import load, save

    console = Console(as_json=as_json)
    if recipe not in RECIPES:
        raise UsageError(f"there is no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty; choose another folder")
    base = load(model, classes=classes, device=device)
    names = base.classes.names
    if target is not None and target not in names:
        raise UsageError(f"the model has no class {target!r}; it has {', '.join(map(repr, names[:10]))}")
    train, held_out = _read(images, base, limit, seed, console)
    console.say(f"training on {len(train)} images by the recipe {recipe!r} on {base.device}")
    settings = TrainingSettings(epochs, min(batch, len(train)), learning_rate, seed=seed)
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
