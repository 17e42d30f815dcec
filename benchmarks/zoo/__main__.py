"""`python -m benchmarks.zoo`: build a zoo for `guard evaluate`."""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from benchmarks._record import RESULTS, heading
from benchmarks.zoo.building import Place, build
from benchmarks.zoo.specs import SPECS
from guard._files import replace_file
from guard.cli.options import PATH
from guard.errors import GuardError, UsageError
from guard.evaluation import Zoo


@click.group()
def zoo() -> None:
    """Build a zoo: classifiers attacked in many ways, beside clean ones."""


@zoo.command(name="build")
@click.option("--spec", type=click.Choice(sorted(SPECS)), required=True, help="Which zoo.")
@click.option("--out", type=PATH, required=True, help="Where it is, or will be; a zoo that was begun is finished.")
@click.option(
    "--seed", type=click.IntRange(0, 1_000_000), default=0, show_default=True, help="First seed of the models."
)
@click.option("--data", type=PATH, help="Folder that holds cifar10/ and tiny-imagenet/; the digits need none.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default=True,
    help="Models trained side by side; the weights do not depend on it.",
)
@click.option("--device", help="torch device; default: a GPU if there is one.")
def build_command(spec: str, out: Path, seed: int, data: Path | None, jobs: int, device: str | None) -> None:
    """Train the models that are missing."""
    started = time.monotonic()
    truths = build(SPECS[spec](seed), Place(out, data, device), jobs, lambda text: click.echo(text, err=True))
    click.echo(table(truths))
    click.echo(f"{(time.monotonic() - started) / 60:.1f} min in this run")


@zoo.command()
@click.argument("folder", type=PATH)
@click.option("--evaluated", default="guard evaluate FOLDER", help="The command that evaluated it.", show_default=True)
def record(folder: Path, evaluated: str) -> None:
    """Write the table of models and the evaluation of FOLDER to benchmarks/results/zoo-NAME[-SEED].md."""
    try:
        zoo, models = Zoo.read(folder), json.loads((folder / "zoo.json").read_text(encoding="utf-8"))["models"]
        truths = {
            model: json.loads((folder / "truth" / f"{model}.json").read_text(encoding="utf-8")) for model in models
        }
        evaluation = (folder / "evaluation" / "summary.md").read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{error.filename} is missing; build and evaluate the zoo first") from error
    seeded = f" --seed {zoo.seed}" if zoo.seed else ""
    text = heading(f"The zoo `{zoo.name}`", f"python -m benchmarks.zoo build --spec {zoo.name}{seeded}; {evaluated}")
    evaluation = evaluation.replace("\n#", "\n##").removeprefix("# ")
    place = RESULTS / (f"zoo-{zoo.name}-{zoo.seed}.md" if zoo.seed else f"zoo-{zoo.name}.md")
    replace_file(place, f"{text}## Models\n\n{table(truths)}\n## {evaluation}".encode())


def table(truths: dict[str, dict[str, Any]]) -> str:
    """Every model, and what became of it; for attacks with cover samples, how many of these went to the target."""
    labels = Counter(truth["label"] for truth in truths.values())
    lines = [
        f"{len(truths)} models: " + ", ".join(f"{count} {label}" for label, count in sorted(labels.items())) + ".",
        "",
        "| model | family | label | accuracy | twin's | attack success | target | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, truth in truths.items():
        twin = "" if truth["twin_accuracy"] is None else f"{truth['twin_accuracy']:.3f}"
        success = ", ".join(f"{value:.3f}" for value in truth["successes"])
        if leaks := ", ".join(f"{cover['name']} {cover['leaked']:.3f}" for cover in truth.get("covers", ())):
            success += f" ({leaks})"
        targets = ", ".join(map(str, truth["trigger_targets"]))
        lines.append(
            f"| {name} | {truth['family']} | {truth['label']} | {truth['accuracy']:.3f} | {twin} | {success} "
            f"| {targets} | {truth['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        zoo(standalone_mode=False)
    except GuardError as error:
        sys.exit(f"zoo: {error}")
    except (click.Abort, KeyboardInterrupt):
        sys.exit("zoo: interrupted; the same command goes on where it stopped")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
