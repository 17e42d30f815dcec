"""`guard calibrate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.profiles import LeftOut


@click.command()
@click.argument("profile", type=options.PATH)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of clean images like those that requests will carry, none of them used in training.",
)
@click.option(
    "--embeddings",
    type=options.PATH,
    help="Embeddings of clean requests instead (.npy, [N, D]), such as recorded traffic: a new threshold, old banks.",
)
@click.option("--alpha", type=float, default=0.01, show_default=True, help="Share of clean images that may be flagged.")
@click.option("--model", help="The model, if it is no longer where the profile says.")
@click.option("--k", type=click.IntRange(min=1), help="Neighbour that distances are taken to; default: by bank size.")
@click.option("--limit", type=click.IntRange(min=10), default=5000, show_default=True, help="Most images to use.")
@click.option(
    "--per-class",
    is_flag=True,
    help="Hold alpha for each predicted class that has enough images, not only on the whole.",
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
    """Build the banks of PROFILE and set the threshold for a false-alarm rate.

    The smallest possible alpha is 1 / (n + 1), where n are 40 % of the images, or two thirds of the embeddings.
    """
    import guard
    from guard import profiles, report

    if (images is None) == (embeddings is None):
        raise UsageError("give one of --images and --embeddings")
    console = Console(as_json=as_json)
    stored = guard.Profile.open(profile)
    if embeddings is not None:
        if k is not None or model is not None:
            raise UsageError("--k and --model belong to --images: with --embeddings the banks stay as they are")
        vectors = profiles.read_embeddings(embeddings, stored.document.model.embedding)
        calibrated = stored.recalibrate(vectors, alpha, per_class=per_class, seed=seed)
        text = report.render(calibrated, report.examples(calibrated))
    elif images is not None:
        folder = guard.ImageFolder.scan(images).sample(limit, seed=seed)
        classifier = guard.load(
            model or stored.document.model.source, classes=stored.document.model.classes, device=device
        )
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
        f"false alarms on {record.held_out} kept out: {record.false_alarms} ({rate:.2%})\n"
        + _left_out(record.left_out)
        + f"profile: {profile}",
    )


def _left_out(items: Sequence["LeftOut"]) -> str:
    if not items:
        return ""
    names = ", ".join(item.image for item in items[:5]) + (", …" if len(items) > 5 else "")
    return f"left out, since they seem to carry a trigger: {len(items)} images ({names}); the report lists them\n"
