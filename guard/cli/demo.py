"""`guard demo`."""

from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console


@click.command()
@click.option(
    "--images",
    type=options.PATH,
    help="Folder with one sub-folder per class, at most 20,000 images of it; default: handwritten digits.",
)
@click.option(
    "--out", type=options.PATH, default=Path("guard-demo"), show_default=True, help="Where to write everything."
)
@options.seed
@options.device
@options.as_json
@click.pass_context
def demo(ctx: click.Context, images: Path | None, out: Path, seed: int, device: str | None, *, as_json: bool) -> None:
    """Show all of guard on a small example.

    Trains a clean CLIP classifier, a backdoored one and its clean twin; vets both; serves the backdoored one behind
    screening; attacks it; writes a report. Exits with 1 if anything is not as it should be.
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
