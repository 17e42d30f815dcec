"""`guard calibrate`."""

from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console


@click.command()
@click.argument("profile", type=options.PATH)
@options.images("Folder of clean images like those that requests will carry, none of them used in training.")
@click.option("--alpha", type=float, default=0.01, show_default=True, help="Share of clean images that may be flagged.")
@click.option("--model", help="The model, if it is no longer where the profile says.")
@click.option("--k", type=click.IntRange(min=1), help="Neighbour that distances are taken to; default: by bank size.")
@click.option("--limit", type=click.IntRange(min=10), default=5000, show_default=True, help="Most images to use.")
@options.seed
@options.device
@options.as_json
def calibrate(
    profile: Path,
    images: Path,
    alpha: float,
    model: str | None,
    k: int | None,
    limit: int,
    seed: int,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Build the banks of PROFILE and set the threshold for a false-alarm rate.

    The smallest possible alpha is 1 / (0.4 × images + 1).
    """
    from guard import profiles, report
    from guard.classifiers import ImageFolder, load

    console = Console(as_json=as_json)
    stored = profiles.read(profile)
    folder = ImageFolder.scan(images).sample(limit, seed=seed)
    classifier = load(model or stored.document.model.source, classes=stored.document.model.classes, device=device)
    stored.check_model(classifier.digest)
    import torch

    pixels = torch.from_numpy(folder.pixels(classifier.preprocessing, console.progress))
    calibrated = profiles.calibrate(stored, classifier, pixels, alpha, k=k, seed=seed, progress=console.say)
    text = report.render(calibrated, report.examples(calibrated, pixels))
    profiles.write(calibrated, profile, report=text)
    record = calibrated.document.calibration
    if record is None:
        raise AssertionError("calibration leaves a record")
    console.result(
        record,
        f"score: {record.score}, k = {record.k}, {record.reference} images in each bank\n"
        f"threshold: {record.threshold.value:.4f} for alpha = {alpha:g}, from {record.threshold.size} images\n"
        f"false alarms on {record.held_out} images kept out: {record.false_alarms}\n"
        f"profile: {profile}",
    )
