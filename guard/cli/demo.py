"""`guard demo`."""

from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console


@click.command()
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of images with one sub-folder for each class, of which at most 20,000 images are used. By default, "
    "the demo uses images of handwritten digits.",
)
@click.option(
    "--out", type=options.PATH, default=Path("guard-demo"), show_default=True, help="Folder to write all results to."
)
@options.seed
@options.device
@options.as_json
@click.pass_context
def demo(ctx: click.Context, images: Path | None, out: Path, seed: int, device: str | None, *, as_json: bool) -> None:
    """Show all of guard on a small example.

    The demo trains a clean CLIP classifier, plants a backdoor in a copy, and trains a clean twin of the copy. It vets
    copy and twin, serves the backdoored classifier behind the screening sidecar, attacks it, and writes a report. The
    exit code is 1 if a result is not as expected.
    """
    from guard.classifiers.open_clip import import_open_clip

    console = Console(as_json=as_json)
    import_open_clip()
    from guard.demo import run, table

    result = run(
        out,
        images,
        seed=seed,
        device=device,
        say=console.say,
        progress=console.progress,
        clock=lambda: console.seconds,
    )
    console.result(result, table(result))
    ctx.exit(1 if result.failures else 0)
