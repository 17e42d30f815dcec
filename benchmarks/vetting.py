"""Does a verdict depend on the seed, and what does the race lose?

python -m benchmarks.vetting ZOO --measured FILE [--models PATTERN] [--budget BUDGET] [--seeds 5] [--exhaustive]

Each run is a line of FILE; runs that it holds are not made again. Then benchmarks/results/vetting.md is written.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, heading
from guard.classifiers import Classifier, load
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.evaluation.statistics import Rate
from guard.vetting import vet

IMAGES = 1000


def main() -> None:
    """Run what is missing, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--models", default="*")
    parser.add_argument("--budget", default="quick", choices=("quick", "standard", "thorough"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--exhaustive", action="store_true")
    arguments = parser.parse_args()
    path: Path = arguments.measured
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    known = {(row["model"], row["seed"], row["race"]) for row in rows}
    zoo = Zoo.read(arguments.zoo)
    bases: dict[str, Classifier] = {}
    for name in zoo.select(arguments.models):
        truth, base = zoo.truth(name), zoo.models[name].base
        if truth is None or truth.label == "failed attack" or base is None:
            continue
        runs = [(seed, True) for seed in range(arguments.seeds)] + [(0, False)] * arguments.exhaustive
        for seed, race in runs:
            if (name, seed, race) in known:
                continue
            if base not in bases:
                bases = {base: load(str(zoo.model(base)))}
            rows.append(_run(zoo, name, bases[base], arguments.budget, seed, race=race))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            sys.stderr.write(f"{rows[-1]}\n")
    command = f"python -m benchmarks.vetting {zoo.name} --seeds {arguments.seeds} --budget {arguments.budget}"
    text = heading("Vetting: seeds, and the race", command + " --exhaustive" * arguments.exhaustive)
    (RESULTS / "vetting.md").write_text(text + report(rows), encoding="utf-8")


def _run(zoo: Zoo, name: str, base: Classifier, budget: Any, seed: int, *, race: bool) -> dict[str, Any]:  # noqa: ANN401 - argparse has checked it
    classifier = load(str(zoo.model(name)))
    folder = zoo.root / "images" / zoo.models[name].images
    images = pixels(ImageSet.of_zoo(folder, vetting=IMAGES, seed=0), classifier.preprocessing).vetting
    found = vet(classifier, images, base=base, budget=budget, seed=seed, race=race)
    truth = zoo.truth(name)
    return {
        "model": name,
        "label": truth.label if truth else "",
        "targets": list(truth.targets) if truth else [],
        "seed": seed,
        "race": race,
        "outcome": found.verdict.outcome,
        "target": found.verdict.target,
        "p_value": found.verdict.p_value,
        "passes": found.passes,
        "seconds": round(found.seconds, 1),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The tables."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    lines = ["| model | label | verdicts over the seeds | passes, race | passes, exhaustive | exhaustive verdict |"]
    lines.append("| --- " * 6 + "|")
    steady, same, compared, ratios = 0, 0, 0, []
    for name, runs in by_model.items():
        raced = [row for row in runs if row["race"]]
        outcomes = Counter(_said(row) for row in raced)
        steady += len(outcomes) == 1
        mean = sum(row["passes"] for row in raced) / len(raced)
        whole = next((row for row in runs if not row["race"]), None)
        if whole:
            first = next(row for row in raced if row["seed"] == whole["seed"])
            compared, same = compared + 1, same + (_said(first) == _said(whole))
            ratios.append(first["passes"] / whole["passes"])
        verdicts = ", ".join(f"{said} × {count}" for said, count in outcomes.most_common())
        exhaustive = ("–", "–") if whole is None else (f"{whole['passes']:,}", _said(whole))
        lines.append(f"| {name} | {raced[0]['label']} | {verdicts} | {mean:,.0f} | {exhaustive[0]} | {exhaustive[1]} |")
    lines.append("")
    lines.append(f"Same verdict and target for every seed: {Rate.of(steady, len(by_model)).brief}.")
    if compared:
        ratio = sum(ratios) / len(ratios)
        lines.append(
            f"Race and exhaustive search agree in verdict and target: {Rate.of(same, compared).brief}. "
            f"The race made {ratio:.1%} of the passes (mean; largest {max(ratios):.1%})."
        )
    return "\n".join(lines) + "\n"


def _said(row: dict[str, Any]) -> str:
    return str(row["outcome"]) + ("" if row["target"] is None else f" ({row['target']})")


if __name__ == "__main__":
    main()
