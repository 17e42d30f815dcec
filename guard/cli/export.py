"""`guard export`."""

from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console


@click.command()
@click.argument("model")
@click.option("--out", type=options.PATH, required=True, help="Where to write model.onnx and classifier.json.")
@options.images("At least 256 images, on which the exported model must compute the same.")
@options.classes
@click.option("--limit", type=click.IntRange(min=256), default=1000, show_default=True, help="Most images to use.")
@options.seed
@options.device
@options.as_json
def export(
    model: str,
    out: Path,
    images: Path,
    classes: Path | None,
    limit: int,
    seed: int,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Write MODEL as ONNX for serving, image tower and head, after a parity check on real images."""
    from guard.classifiers import ImageFolder, load

    console = Console(as_json=as_json)
    folder = ImageFolder.scan(images).sample(limit, seed=seed)
    classifier = load(model, classes=classes, device=device)
    import torch

    from guard.classifiers import export as write

    pixels = torch.from_numpy(folder.pixels(classifier.preprocessing, console.progress))
    parity = write(classifier, out, pixels)
    console.result(
        parity,
        f"parity on {parity.images} images: embeddings differ by at most {parity.max_difference:.1e}, "
        f"top class equal on {parity.agreement:.0%}\nexported: {out}",
    )
