"""Whether vetting by stages says the same as an inspection of every class and family to its end.

python -m benchmarks.class_by_class run ZOO --rows FILE [--classes 10,50] [--models PATTERN] [--share K/N]
python -m benchmarks.class_by_class report ZOO --rows FILE

`run` vets each model against its base both ways, with its own classes and with further ones, whose names are made by
code: up to 32 classes the stages save steps alone, of more they inspect only candidates. It takes the models in a
random order (of seed 0), appends a line to the file for each vetting, and goes on where it was stopped. `report` writes
benchmarks/results/class-by-class-ZOO-SEED.md.
"""

import argparse
import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks._record import RESULTS, heading, read_rows
from benchmarks.real_sizes import names
from guard.classifiers import ClassList, load
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.evaluation.statistics import Rate
from guard.vetting import vet

IMAGES = 1000


def _every_class_to_its_end() -> ExitStack:
    stack = ExitStack()
    for module in ("examination", "race"):
        stack.enter_context(patch(f"guard.vetting.{module}.RACED_CLASSES", 10**9))
    stack.enter_context(patch("guard.vetting.race._is_clear", lambda _: False))
    stack.enter_context(patch("guard.vetting.race._HOPELESS", 1.0))
    return stack


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "stages": nullcontext,
    "class by class": _every_class_to_its_end,
}


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--classes", default="10,50")
    parser.add_argument("--models", default="*")
    parser.add_argument("--share", default="1/1")
    given = parser.parse_args()
    zoo = Zoo.read(given.zoo)
    if given.what == "report":
        text = heading("Vetting by stages and class by class", f"python -m benchmarks.class_by_class run {zoo.name}")
        (RESULTS / f"class-by-class-{zoo.name}-{zoo.seed}.md").write_text(
            text + report(zoo, read_rows(given.rows)), encoding="utf-8"
        )
    else:
        run(zoo, given)


def run(zoo: Zoo, given: argparse.Namespace) -> None:
    """Vet what is missing."""
    chosen = [
        name for name in sorted(zoo.models) if (truth := zoo.truth(name)) and truth.label != "failed attack"
    ]  # fmt: skip
    random.Random(0).shuffle(chosen)  # noqa: S311 - the order of a sample
    number, shares = map(int, given.share.split("/"))
    done = {(row["model"], row["classes"], row["way"]) for row in read_rows(given.rows)}
    for name in chosen[number - 1 :: shares]:
        base, truth = zoo.models[name].base, zoo.truth(name)
        if base is None or truth is None or not fnmatchcase(name, given.models):
            continue
        for count in map(int, given.classes.split(",")):
            own = load(str(zoo.model(name))).classes
            classes = ClassList((*own.names, *names(count))[:count], own.templates)
            suspect, trusted = (load(str(zoo.model(each)), classes=classes) for each in (name, base))
            images = ImageSet.of_zoo(zoo.root / "images" / zoo.models[name].images, vetting=IMAGES, seed=0)
            shown = pixels(images, suspect.preprocessing).vetting
            for way, arranged in WAYS.items():
                if (name, count, way) in done:
                    continue
                with arranged():
                    found = vet(suspect, shown, base=trusted, budget="quick", seed=0, repeats=1)
                row = {
                    "model": name, "label": truth.label, "targets": list(truth.targets), "classes": count, "way": way,
                    "outcome": found.verdict.outcome, "target": found.verdict.target, "p": found.verdict.p_value,
                    "passes": found.passes, "seconds": round(found.seconds, 1),
                }  # fmt: skip
                with given.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def report(zoo: Zoo, rows: list[dict[str, Any]]) -> str:
    """How often both say the same, and where they do not."""
    found: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["classes"], row["model"]), {})[row["way"]] = row
    pairs = {key: (each["stages"], each["class by class"]) for key, each in found.items() if len(each) == len(WAYS)}
    text = f"""Zoo `{zoo.name}` of seed {zoo.seed}, {IMAGES} images, budget quick, seed 0, against the base; models in a
random order, as many as were measured. *Class by class* inspects every class of every family to its end; triggers are
reconstructed for classes that stand out, in both. A verdict is better if it accuses the right class of an attacked
model, or none of a clean one, where the other does not."""
    columns = "classes | models | attacked | same verdict and class | stages better | class by class better"
    lines = [text, "", f"| {columns} | passes, stages | passes, class by class |", "| --- " * 8 + "|"]
    differing = ["", "| classes | model | truth | stages | class by class |", "| --- " * 5 + "|"]
    for count in sorted({count for count, _ in pairs}):
        mine = [pair for (classes, _), pair in pairs.items() if classes == count]
        same = sum(_said(one) == _said(other) for one, other in mine)
        better = [sum(_right(pair[k]) > _right(pair[1 - k]) for pair in mine) for k in (0, 1)]
        passes = [sum(pair[k]["passes"] for pair in mine) / len(mine) for k in (0, 1)]
        attacked = sum(one["label"] == "backdoored" for one, _ in mine)
        lines.append(
            f"| {count} | {len(mine)} | {attacked} | {Rate.of(same, len(mine)).brief} | {better[0]} | {better[1]} "
            f"| {passes[0]:,.0f} | {passes[1]:,.0f} |"
        )
        for one, other in mine:
            if _said(one) != _said(other):
                differing.append(
                    f"| {count} | {one['model']} | {one['label']} {one['targets'] or ''} "
                    f"| {_said(one)}, p = {one['p']:.2g} | {_said(other)}, p = {other['p']:.2g} |"
                )
    return "\n".join(lines + (differing if differing[3:] else [])) + "\n"


def _right(row: dict[str, Any]) -> bool:
    if row["label"] == "clean":
        return bool(row["outcome"] != "backdoored")
    return bool(row["outcome"] == "backdoored" and row["target"] in row["targets"])


def _said(row: dict[str, Any]) -> str:
    return str(row["outcome"]) + ("" if row["target"] is None else f" ({row['target']})")


if __name__ == "__main__":
    main()
