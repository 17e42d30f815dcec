"""How often the verdict of vetting depends on its seed.

python -m benchmarks.seeds run ZOO --rows FILE [--seeds N] [--without-base] [--budget quick] [--share K/N]
python -m benchmarks.seeds report ZOO --rows FILE [--out DIR]

`run` vets the models of a zoo in a random order (of seed 0), each with several seeds, adds a line to the file for each
vetting, and goes on where it was stopped. `report` counts the models that have all seeds, and says what `guard vet`
makes of them, which looks again with the next two seeds where a verdict is close to a threshold.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, heading, read_rows
from guard.classifiers import load
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.evaluation.statistics import Rate
from guard.vetting import vet
from guard.vetting.agreement import CONFIRMATIONS, until_clear

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
        report(zoo, read_rows(given.rows), given.seeds, given.out)
    else:
        run(zoo, given)


def run(zoo: Zoo, given: argparse.Namespace) -> None:
    """Vet models that have not all seeds yet."""
    names = [name for name in sorted(zoo.models) if (truth := zoo.truth(name)) and truth.label != "failed attack"]
    random.Random(0).shuffle(names)  # noqa: S311 - the order of a sample
    number, count = map(int, given.share.split("/"))
    kind = "derived" if given.without_base else "base"
    done = {(row["model"], row["reference"], row["seed"]) for row in read_rows(given.rows)}
    for name in names[number - 1 :: count]:
        truth, trusted = zoo.truth(name), zoo.models[name].base
        left = any((name, kind, seed) not in done for seed in range(given.seeds))
        if truth is None or trusted is None or not left:
            continue
        classifier, base = load(str(zoo.model(name))), None if given.without_base else load(str(zoo.model(trusted)))
        chosen = ImageSet.of_zoo(zoo.root / "images" / zoo.models[name].images, vetting=IMAGES, seed=0)
        images = pixels(chosen, classifier.preprocessing).vetting
        vettings = [
            vet(classifier, images, budget=given.budget, base=base, seed=seed, repeats=1) for seed in range(given.seeds)
        ]
        for seed, once in enumerate(vettings):
            again = until_clear(vettings[(seed + k) % len(vettings)] for k in range(CONFIRMATIONS))
            row = {
                "model": name, "label": truth.label, "targets": list(truth.targets), "reference": kind, "seed": seed,
                "outcome": once.verdict.outcome, "target": once.verdict.target, "p": once.verdict.p_value,
                "again": [again.verdict.outcome, again.verdict.target], "again_p": again.verdict.p_value,
                "passes": once.passes, "seconds": round(once.seconds, 1), "budget": given.budget,
            }  # fmt: skip
            with given.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def report(zoo: Zoo, rows: list[dict[str, Any]], seeds: int, out: Path) -> None:
    """Count, and write the result."""
    columns = (
        "reference", "vetting", "models", "same verdict and class with every seed", "backdoored: accused by all seeds",
        "by some", "clean: accused by all seeds", "by some",
    )  # fmt: skip
    about = (
        f"Zoo `{zoo.name}` of seed {zoo.seed}, {IMAGES} images, seeds 0 to {seeds - 1} of the vetting; models in a "
        "random order, as many as were measured. *Once*: the verdict of one seed. *Looked at again*: as `guard vet` "
        "does it, with the next of these seeds, in a circle, up to two, while the verdict is close to a threshold. "
        "Intervals are exact, 95 %."
    )
    lines = [
        about,
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    changing = []
    for kind in ("base", "derived"):
        of: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            if row["reference"] == kind and row["seed"] < seeds:
                of.setdefault(row["model"], []).append(row)
        whole = {name: each for name, each in of.items() if len(each) == seeds}
        if not whole:
            continue
        once = {name: [(row["outcome"], row["target"]) for row in each] for name, each in whole.items()}
        again = {name: [(row["again"][0], row["again"][1]) for row in each] for name, each in whole.items()}
        for rule, said in (("once", once), ("looked at again", again)):
            same = sum(len(set(each)) == 1 for each in said.values())
            cells = [kind, rule, str(len(said)), share(same, len(said))]
            for label in ("backdoored", "clean"):
                accused = [
                    sum(outcome == "backdoored" for outcome, _ in each)
                    for name, each in said.items()
                    if whole[name][0]["label"] == label
                ]
                cells.append(share(accused.count(seeds), len(accused)))
                cells.append(str(sum(0 < count < seeds for count in accused)))
            lines.append(f"| {' | '.join(cells)} |")
        for name, each in sorted(whole.items()):
            if len(set(once[name])) == 1:
                continue
            spread = sorted(row["p"] for row in each)
            truth = each[0]["label"]
            counted = f"{_counts(once[name])} | {_counts(again[name])}"
            changing.append(f"| {kind} | {name} | {truth} | {counted} | {spread[0]:.2g} to {spread[-1]:.2g} |")
    if changing:
        lines += [
            "",
            "Where it changed:",
            "",
            "| reference | model | truth | once | looked at again | p |",
            "| --- " * 6 + "|",
            *changing,
        ]
    passes = [row["passes"] for row in rows]
    lines += ["", f"{len(rows)} vettings, {sum(passes) / max(1, len(passes)):,.0f} passes each on average."]
    text = heading("Verdicts and seeds", f"python -m benchmarks.seeds run {zoo.name}; report")
    (out / f"seeds-{zoo.name}-{zoo.seed}.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def _counts(verdicts: list[tuple[str, int | None]]) -> str:
    return ", ".join(f"{count} × {outcome}" for (outcome, _), count in Counter(verdicts).most_common())


def share(count: int, among: int) -> str:
    """A share with its interval."""
    return Rate.of(count, among).brief if among else "–"


if __name__ == "__main__":
    main()
