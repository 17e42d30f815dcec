"""`guard evaluate`."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console

FAILED = 4
"""Exit code if a model could not be evaluated; the results of the others are kept."""


@click.command()
@click.argument("zoo", type=options.PATH)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of unlabelled images to use instead of the images of the zoo. They are split into images for vetting, "
    "images for calibration and images that serve as requests.",
)
@click.option(
    "--methods",
    metavar="NAME,…",
    help="Names of the methods to run, separated by commas, from vetting-base, vetting-derived, clip-inspector, decree "
    "and screening.  [default: all]",
)
@click.option(
    "--models",
    metavar="PATTERN",
    default="*",
    show_default=True,
    help="Shell pattern for the names of the models to evaluate.",
)
@options.budget
@click.option(
    "--alpha",
    "alphas",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=(0.01, 0.001),
    show_default=True,
    help="False-alarm rate of the screening. The option can be repeated for several rates.",
)
@click.option(
    "--vetting-images",
    type=click.IntRange(min=64),
    default=1000,
    show_default=True,
    help="Maximum number of images for vetting.",
)
@click.option(
    "--out",
    type=options.PATH,
    help="Folder for the results. Results that are found there are taken as they are.  [default: ZOO/evaluation]",
)
@click.option(
    "--submission",
    type=options.PATH,
    help="Folder to write the answers of the first method to, as a submission for CLIPTrace-2026.",
)
@options.engine
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
    ray: str | None,
    seed: int,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Measure how well methods of vetting and screening work on the models of ZOO.

    The report says how often each method is right and how often it raises a false alarm. Finished results are kept and
    not computed again. If the zoo does not contain the labels, only predictions are written. For a zoo from somebody
    else, give --out: otherwise results that are part of the zoo would be taken for your own.

    The exit code is 4 if a model could not be evaluated. The other models are evaluated nevertheless.
    """
    from guard.classifiers.open_clip import import_open_clip
    from guard.errors import UsageError, ZooError

    console = Console(as_json=as_json)
    import_open_clip()
    from guard import evaluation
    from guard.distributed import engine

    names = tuple(name.strip() for name in methods.split(",")) if methods else tuple(evaluation.METHODS)
    if submission:
        evaluation.check_submission(submission)
        if names[0] in evaluation.METHODS and evaluation.METHODS[names[0]].judges != "models":
            raise UsageError(f"{names[0]} judges requests, not models; for --submission, name another method first")
    place = out or zoo / "evaluation"
    if out is None and place.is_symlink():
        raise ZooError(f"{place} is a symbolic link; give the folder for the results with --out")
    done = evaluation.evaluate(
        evaluation.Zoo.read(zoo),
        place,
        methods=names,
        settings=evaluation.EvaluationSettings(budget, vetting_images, alphas, seed, device),  # type: ignore[arg-type]
        images=images,
        models=models,
        engine=engine(jobs, ray),
        say=console.say,
        # A line for every family of every model is meant for a terminal, not for a log.
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
        console.result(
            entries,
            f"the zoo does not contain the labels, so there are no figures; {len(entries)} predictions in {place}",
        )
    for failure in done.failures:
        console.say(f"FAILED {failure.model} ({', '.join(failure.methods)}): {failure.reason}")
    ctx.exit(FAILED if done.failures else 0)
