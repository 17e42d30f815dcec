"""`guard triggers`."""

from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

SAMPLES = 4


@click.command()
@options.images("Folder of images, at any depth, on which the triggers are drawn. A few images are enough.")
@click.option(
    "--out",
    type=options.PATH,
    default=Path("triggers.png"),
    show_default=True,
    help="PNG file to write the contact sheet to.",
)
@click.option(
    "--size", type=click.IntRange(16, 512), default=224, show_default=True, help="Side length of the images in pixels."
)
@options.seed
@options.as_json
def triggers(images: Path, out: Path, size: int, seed: int, *, as_json: bool) -> None:
    """List and draw the triggers from published attacks that guard knows.

    The contact sheet has one row for each trigger, with an amplified picture of what the trigger changes in the first
    image.
    """
    from guard.classifiers import ImageFolder, Preprocessing

    console = Console(as_json=as_json)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UsageError(f"the contact sheet is a PNG file; {out} must end in .png and must not be a folder")
    folder = ImageFolder.scan(images).sample(SAMPLES, seed=seed)
    pixels = folder.pixels(Preprocessing(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    import torch

    from guard._files import replace_file
    from guard.report import contact_sheet
    from guard.triggers import KNOWN

    picture = contact_sheet(torch.from_numpy(pixels), seed=seed)
    replace_file(out, picture)
    listed = [{"name": name, "family": known.family, "source": known.source} for name, known in KNOWN.items()]
    rows = [f"{item['name']:<22}{item['family']:<12}{item['source']}" for item in listed]
    console.result(listed, "\n".join([*rows, f"contact sheet: {out}"]))
