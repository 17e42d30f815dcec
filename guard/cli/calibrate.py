"""`guard calibrate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import ModelError, UsageError

if TYPE_CHECKING:
    from guard.profiles import LeftOut


@click.command()
@click.argument("profile", type=options.PATH)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of clean images like those that requests will carry. None of them may have been used in training.",
)
@click.option(
    "--embeddings",
    type=options.PATH,
    help="File of embeddings of clean requests (.npy, shape [N, D]), such as recorded traffic, to use instead of "
    "--images. Then only the threshold is set anew, and the banks stay as they are.",
)
@click.option(
    "--alpha",
    type=float,
    default=0.01,
    show_default=True,
    help="False-alarm rate: the share of clean images that may be flagged.",
)
@click.option(
    "--model",
    help="The model that the profile was made for, if it is no longer at the place that the profile names.",
)
@click.option(
    "--k",
    type=click.IntRange(min=1),
    help="Number of nearest neighbours that the density score uses. By default, it follows from the size of the banks.",
)
@click.option(
    "--limit", type=click.IntRange(min=10), default=5000, show_default=True, help="Maximum number of images to use."
)
@click.option(
    "--per-class",
    is_flag=True,
    help="Keep the false-alarm rate for each predicted class that has enough images, and not only over all classes.",
)
@options.seed
@options.device
@options.as_json
def calibrate(
    profile: Path,
    images: Path | None,
    embeddings: Path | None,
    alpha: float,
    model: str | None,
    k: int | None,
    limit: int,
    seed: int,
    device: str | None,
    *,
    per_class: bool,
    as_json: bool,
) -> None:
    """Build the reference banks of PROFILE and set the threshold for a false-alarm rate.

    The smallest possible false-alarm rate is 1 / (n + 1), where n is 40 % of the number of images, or two thirds of the
    number of embeddings.
    """
    import guard
    from guard import profiles, report

    if (images is None) == (embeddings is None):
        raise UsageError("give one of --images and --embeddings")
    console = Console(as_json=as_json)
    stored = guard.Profile.open(profile)
    if embeddings is not None:
        if k is not None or model is not None:
            raise UsageError("--k and --model need --images: with --embeddings the banks stay as they are")
        vectors = profiles.read_embeddings(embeddings, stored.document.model.embedding)
        calibrated = stored.recalibrate(vectors, alpha, per_class=per_class, seed=seed)
        text = report.render(calibrated, report.examples(calibrated))
    elif images is not None:
        folder = guard.ImageFolder.scan(images).sample(limit, seed=seed)
        named = model or stored.document.model.source
        try:
            classifier = guard.load(named, classes=stored.document.model.classes, device=device)
        except ModelError as error:
            if model is not None:
                raise
            hint = f"the profile names its model {named!r}, as it was given to guard vet; give its place with --model"
            raise ModelError(f"{error}; {hint}") from error
        stored.check_model(classifier.digest)
        pixels = classifier.read(folder, console.progress)
        calibrated = stored.calibrate(
            classifier,
            pixels,
            alpha,
            k=k,
            per_class=per_class,
            names=[str(file.relative_to(folder.root)) for file in folder.files],
            seed=seed,
            progress=console.say,
        )
        text = report.render(calibrated, report.examples(calibrated, pixels))
    calibrated.save(profile, report=text)
    record = calibrated.document.calibration
    if record is None:
        raise AssertionError("calibration leaves a record")
    rate = record.false_alarms / max(1, record.held_out)
    console.result(
        record,
        f"scores: {', '.join(record.tails)}; k = {record.k}, {record.reference} images in each bank\n"
        f"threshold: {record.threshold.value:.4f} for alpha = {alpha:g}, from {record.threshold.size} clean scores\n"
        f"false alarms on {record.held_out} held-out images: {record.false_alarms} ({rate:.2%})\n"
        + _left_out(record.left_out)
        + f"profile: {profile}",
    )


def _left_out(items: Sequence["LeftOut"]) -> str:
    if not items:
        return ""
    names = ", ".join(item.image for item in items[:5]) + (", …" if len(items) > 5 else "")
    return f"left out because they seem to carry a trigger: {len(items)} images ({names}); the report lists them\n"
