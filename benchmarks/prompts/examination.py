"""What vetting and screening make of a zoo of prompt learners.

    python -m benchmarks.prompts.examination run --zoo ZOO --measured FILE [--part PART …] [--method METHOD …]
        [--only PATTERN] [--jobs N]
    python -m benchmarks.prompts.examination report --measured FILE [FILE …]

`run` builds each learner that is missing (`benchmarks.prompts.zoo`) and examines it. Methods are `vetting`
(guard's, and screening of poisoned learners), `hand-written` (vetting against the hand-written prompts instead of
prompts that are tuned anew), `clip-inspector` (as published), `exhaustive` (vetting without its race),
`tokens` (how the tokens of the meta-net spread under a trigger) and `realign` (repair, beside its controls).
Each result is a line of FILE as soon as it is there, and is not measured again. `report` writes
benchmarks/results/prompts.md.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks._record import processor, read_rows
from benchmarks.prompts.methods import METHODS, subject
from benchmarks.prompts.report import write
from benchmarks.prompts.zoo import PARTS, Item, items, make, towers_of, write_list
from guard.distributed import Lost, engine


@dataclass(frozen=True)
class Task:
    """One learner, and one method."""

    part: str
    item: Item
    folder: Path
    method: str


def done(task: Task) -> dict[str, Any]:
    """Build and examine a learner."""
    torch.set_num_threads(1)
    known = make(task.part, task.item, task.folder, _say)
    return {
        "part": task.part,
        "name": task.item.name,
        "method": task.method,
        "classes": len(PARTS[task.part].classes.names),
        "machine": processor(),
        **{key: known[key] for key in ("family", "kind", "adaptive", "label", "accuracy", "success", "targets")},
        "by_hand": known["towers"],
        **METHODS[task.method](subject(task.part, task.folder, task.item.name)),
    }


def run(parts: list[str], methods: list[str], zoo: Path, path: Path, only: str, jobs: int) -> None:
    """Build and examine what is missing: one method after the other, with learners of all parts in turn."""
    there = {(row["part"], row["name"], row["method"]) for row in read_rows(path)}
    tasks: list[Task] = []
    for method in methods:
        mine = [
            [
                Task(part, item, zoo / part, method)
                for item in items(part)
                if fnmatchcase(item.name, only) and _applies(method, item) and (part, item.name, method) not in there
            ]
            for part in parts
        ]
        in_turn = [task for task in chain(*zip_longest(*mine)) if task is not None]
        # Poisoned learners take longer, and come first, so that all processes end at about the same time.
        tasks += sorted(in_turn, key=lambda task: task.item.recipe.trigger is None)
    with_towers = sorted({(task.part, task.folder) for task in tasks})
    for _ in engine(jobs).map(_towers, with_towers):
        pass
    for place, row in engine(jobs).map(done, tasks):
        if isinstance(row, Lost):
            _say(f"{tasks[place].item.name}: {row.reason}")
            continue
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        _say(json.dumps({key: value for key, value in row.items() if key != "screening"}))
    for part, folder in with_towers:
        write_list(part, folder)


def _applies(method: str, item: Item) -> bool:
    """Whether a method can be used on a learner: only CoCoOp has a meta-net, and only the attacked are repaired."""
    return {"tokens": item.recipe.kind == "cocoop", "realign": item.recipe.trigger is not None}.get(method, True)


def _towers(given: tuple[str, Path]) -> None:
    towers_of(*given, _say)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Run what is missing, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    running = what.add_parser("run")
    running.add_argument("--part", nargs="+", choices=PARTS, default=["reported"])
    running.add_argument("--method", nargs="+", choices=METHODS, default=["vetting", "clip-inspector"])
    running.add_argument("--zoo", type=Path, required=True)
    running.add_argument("--measured", type=Path, required=True)
    running.add_argument("--only", default="*", help="Shell pattern of the names of the learners.")
    running.add_argument("--jobs", type=int, default=1, help="Learners side by side, each on one processor.")
    reporting = what.add_parser("report")
    reporting.add_argument("--measured", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    if arguments.what == "run":
        given = arguments
        run(given.part, given.method, given.zoo, given.measured, given.only, given.jobs)
    else:
        write([row for path in arguments.measured for row in read_rows(path)])


if __name__ == "__main__":
    main()
