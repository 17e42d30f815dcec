"""How often the verdict of vetting depends on its seed.

python -m benchmarks.seeds run ZOO --rows FILE [--seeds N] [--without-base] [--budget quick] [--share K/N]
python -m benchmarks.seeds report ZOO --rows FILE [--out DIR]

`run` vets the models of a zoo in a random order (of seed 0), each with several seeds, adds a line to the file for each
vetting, and goes on where it was stopped. `report` counts the models that have all seeds.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, heading
from guard.classifiers import load
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.evaluation.statistics import Rate
from guard.vetting import vet

IMAGES = 1000


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--without-base", action="store_true")
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    zoo = Zoo.read(given.zoo)
    if given.what == "report":
        report(zoo, read(given.rows), given.seeds, given.out)
    else:
        run(zoo, given)


def read(rows: Path) -> list[dict[str, Any]]:
    """The vettings that were made."""
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []


def run(zoo: Zoo, given: argparse.Namespace) -> None:
    """Vet models that have not all seeds yet."""
    names = [name for name in sorted(zoo.models) if (truth := zoo.truth(name)) and truth.label != "failed attack"]
    random.Random(0).shuffle(names)  # noqa: S311 - the order of a sample
    number, count = map(int, given.share.split("/"))
    kind = "derived" if given.without_base else "base"
    done = {(row["model"], row["reference"], row["seed"]) for row in read(given.rows)}
    for name in names[number - 1 :: count]:
        truth, trusted = zoo.truth(name), zoo.models[name].base
        left = [seed for seed in range(given.seeds) if (name, kind, seed) not in done]
        if truth is None or trusted is None or not left:
            continue
        classifier, base = load(str(zoo.model(name))), None if given.without_base else load(str(zoo.model(trusted)))
        chosen = ImageSet.of_zoo(zoo.root / "images" / zoo.models[name].images, vetting=IMAGES, seed=0)
        images = pixels(chosen, classifier.preprocessing).vetting
        for seed in left:
            vetting = vet(classifier, images, budget=given.budget, base=base, seed=seed)
            row = {
                "model": name, "label": truth.label, "targets": list(truth.targets), "reference": kind, "seed": seed,
                "outcome": vetting.verdict.outcome, "target": vetting.verdict.target, "p": vetting.verdict.p_value,
                "passes": vetting.passes, "seconds": round(vetting.seconds, 1), "budget": given.budget,
            }  # fmt: skip
            with given.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def report(zoo: Zoo, rows: list[dict[str, Any]], seeds: int, out: Path) -> None:
    """Count, and write the result."""
    columns = (
        "reference", "models", "same verdict and class with every seed", "backdoored: accused by all seeds", "by some",
        "clean: accused by any seed", "`guard vet --repeat` says inconclusive",
    )  # fmt: skip
    about = f"Zoo `{zoo.name}` of seed {zoo.seed}, {IMAGES} images, seeds 0 to {seeds - 1} of the vetting; models in a"
    lines = [
        f"{about} random order, as many as were measured. Intervals are exact, 95 %.",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    changing = []
    for kind in ("base", "derived"):
        of: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["reference"] == kind and row["seed"] < seeds:
                of.setdefault(row["model"], []).append(row)
        whole = {name: each for name, each in of.items() if len(each) == seeds}
        if not whole:
            continue
        same = [name for name, each in whole.items() if len({(row["outcome"], row["target"]) for row in each}) == 1]
        accused = {name: sum(row["outcome"] == "backdoored" for row in each) for name, each in whole.items()}
        bad = [name for name, each in whole.items() if each[0]["label"] == "backdoored"]
        good = [name for name in whole if name not in bad]
        lines.append(
            f"| {kind} | {len(whole)} | {share(len(same), len(whole))} | "
            f"{share(sum(accused[name] == seeds for name in bad), len(bad))} | "
            f"{sum(0 < accused[name] < seeds for name in bad)} | "
            f"{share(sum(accused[name] > 0 for name in good), len(good))} | {len(whole) - len(same)} |"
        )
        for name in sorted(set(whole) - set(same)):
            counts = Counter(row["outcome"] for row in whole[name])
            spread = sorted(row["p"] for row in whole[name])
            said = ", ".join(f"{count} × {outcome}" for outcome, count in counts.most_common())
            truth = whole[name][0]["label"]
            changing.append(f"| {kind} | {name} | {truth} | {said} | {spread[0]:.2g} to {spread[-1]:.2g} |")
    if changing:
        lines += [
            "",
            "Where it changed:",
            "",
            "| reference | model | truth | verdicts | p |",
            "| --- " * 5 + "|",
            *changing,
        ]
    passes = [row["passes"] for row in rows]
    lines += ["", f"{len(rows)} vettings, {sum(passes) / max(1, len(passes)):,.0f} passes each on average."]
    text = heading("Verdicts and seeds", f"python -m benchmarks.seeds run {zoo.name}; report")
    (out / f"seeds-{zoo.name}-{zoo.seed}.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def share(count: int, among: int) -> str:
    """A share with its interval."""
    return Rate.of(count, among).brief if among else "–"


if __name__ == "__main__":
    main()
