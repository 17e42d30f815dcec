"""`guard evaluate`."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console

FAILED = 4
"""Exit code when a model could not be evaluated; the others' results are there."""


@click.command()
@click.argument("zoo", type=options.PATH)
@click.option(
    "--images",
    type=options.PATH,
    help="Unlabelled images instead of the zoo's; split into some to search on, some to calibrate, some as requests.",
)
@click.option(
    "--methods",
    metavar="NAME,…",
    help="vetting-base, vetting-derived, clip-inspector, decree, screening.  [default: all]",
)
@click.option("--models", metavar="PATTERN", default="*", show_default=True, help="Only models with such names.")
@options.budget
@click.option(
    "--alpha",
    "alphas",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=(0.01, 0.001),
    show_default=True,
    help="Share of clean requests that screening may flag; may be repeated.",
)
@click.option(
    "--vetting-images", type=click.IntRange(min=64), default=1000, show_default=True, help="Most images to search on."
)
@click.option(
    "--out", type=options.PATH, help="Where results are kept, and believed when found.  [default: ZOO/evaluation]"
)
@click.option("--submission", type=options.PATH, help="Write the first method's answers for CLIPTrace-2026 here.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes side by side.")
@options.seed
@options.device
@options.as_json
@click.pass_context
def evaluate(
    ctx: click.Context,
    zoo: Path,
    images: Path | None,
    methods: str | None,
    models: str,
    budget: str,
    alphas: tuple[float, ...],
    vetting_images: int,
    out: Path | None,
    submission: Path | None,
    jobs: int,
    seed: int,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Run methods over the models of ZOO and report what they find and what they accuse wrongly.

    Finished results are kept and not made again. Where the labels are withheld only predictions are written.
    Give --out for a zoo of others: results that lie in it would be taken for your own.

    Exits with 4 if a model could not be evaluated; the others are.
    """
    from guard.classifiers.open_clip import import_open_clip
    from guard.errors import UsageError, ZooError

    console = Console(as_json=as_json)
    import_open_clip()
    from guard import evaluation

    names = tuple(name.strip() for name in methods.split(",")) if methods else tuple(evaluation.METHODS)
    if submission:
        evaluation.check_submission(submission)
        if names[0] in evaluation.METHODS and evaluation.METHODS[names[0]].judges != "models":
            raise UsageError(f"{names[0]} judges requests, not models; name another method first for --submission")
    place = out or zoo / "evaluation"
    if out is None and place.is_symlink():
        raise ZooError(f"{place} leads elsewhere; say with --out where results are to be kept")
    done = evaluation.evaluate(
        evaluation.Zoo.read(zoo),
        place,
        methods=names,
        settings=evaluation.EvaluationSettings(budget, vetting_images, alphas, seed, device),  # type: ignore[arg-type]
        images=images,
        models=models,
        jobs=jobs,
        say=console.say,
        # A line for every family of every model is for those who watch, not for logs.
        progress=console.progress if sys.stderr.isatty() else lambda *_: None,
    )
    if submission:
        claims = evaluation.predictions(names[0], done)
        evaluation.write_submission(submission, claims)
        missing = len(done.truths) - len(claims)
        console.say(f"submission: {submission}, {len(claims)} models" + (f"; {missing} are MISSING" if missing else ""))
    if any(done.truths.values()):
        summary, text = evaluation.write_summary(done, place)
        console.result(asdict(summary), f"{text}\nsummary: {place}")
    else:
        entries = evaluation.write_predictions(done, place)
        console.result(entries, f"the labels are withheld: no figures, {len(entries)} predictions in {place}")
    for failure in done.failures:
        console.say(f"FAILED {failure.model} ({', '.join(failure.methods)}): {failure.reason}")
    ctx.exit(FAILED if done.failures else 0)
