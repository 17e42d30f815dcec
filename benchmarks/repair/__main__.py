"""`python -m benchmarks.repair`: repair the models of a zoo of digits by every method, and measure.

python -m benchmarks.repair run ZOO --out FOLDER [--jobs N] [--models PATTERN] [--methods NAMES]
python -m benchmarks.repair record FOLDER … [--note TEXT]

`run` vets each model against its base where FOLDER has no profile of it, and appends a line to FOLDER/rows.jsonl for
each model and method, the most important methods first; what is there is not measured again. All methods get the same
400 labelled images, which the models were not trained on: 240 to train on, and 160 for choices and the new vetting.
`perturb-recover (3000)` trains on 3,000 others, since it was made for many pairs. What fails is said and left out; the
same command tries it again. `record` writes benchmarks/results/repair.md.
"""

import argparse
import json
import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, heading, read_rows
from benchmarks.repair.measurement import ORDER, REPAIR, Place, measured, vetted
from benchmarks.repair.report import report
from guard._workers import workers
from guard.evaluation import Zoo


def main() -> None:
    """Run what is missing, or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("zoo", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--jobs", type=int, default=1)
    one.add_argument("--models", default="*")
    one.add_argument("--methods", default=",".join(ORDER))
    two = commands.add_parser("record")
    two.add_argument("folders", type=Path, nargs="+")
    two.add_argument("--note", default="")
    arguments = parser.parse_args()
    if arguments.command == "run":
        names = [name for part in arguments.models.split(",") for name in Zoo.read(arguments.zoo).select(part)]
        run(Place(arguments.zoo, arguments.out), names, arguments.methods.split(","), arguments.jobs)
        return
    rows = [row for folder in arguments.folders for row in read_rows(folder / "rows.jsonl")]
    text = heading("Repair: methods, attacks and cost", "python -m benchmarks.repair run ZOO --out FOLDER")
    (RESULTS / "repair.md").write_text(text + f"{arguments.note}\n\n" * bool(arguments.note) + report(rows), "utf-8")


def run(place: Place, names: list[str], methods: list[str], jobs: int) -> None:
    """Vet and measure what is missing, side by side, one thread each.

    Args:
        place: The zoo and the folder of results.
        names: Models; bases and failed attacks are left out.
        methods: Rows of the table.
        jobs: Number of processes.
    """
    zoo, path = Zoo.read(place.zoo), place.out / "rows.jsonl"
    place.out.mkdir(parents=True, exist_ok=True)
    truths = {name: zoo.truth(name) for name in names if zoo.models[name].base is not None}
    labels = {name: truth.label for name, truth in truths.items() if truth and truth.label != "failed attack"}
    chosen = sorted(labels, key=lambda name: labels[name] == "clean")
    known = {(row["model"], row["method"]) for row in read_rows(path)}
    ready = {name for name in chosen if (place.profile(name) / "profile.json").exists()}
    unvetted = [name for name in chosen if name not in ready]
    tasks = [(name, method) for method in methods for name in chosen if (name, method) not in known]
    # What a method costs on clean models comes last.
    tasks.sort(key=lambda task: labels[task[0]] == "clean" and task[1] != REPAIR)
    with workers(jobs, 1) as pool:
        running: dict[Future[Any], tuple[str, str | None]] = {}
        while True:
            while len(running) < jobs:
                if unvetted:
                    name = unvetted.pop(0)
                    running[pool.submit(vetted, place, name)] = name, None
                elif task := next((each for each in tasks if each[0] in ready), None):
                    tasks.remove(task)
                    running[pool.submit(measured, place, *task)] = task
                else:
                    break
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, method = running.pop(future)
                if error := future.exception():
                    sys.stderr.write(f"{name}, {method or 'vetting'}: {error!r}\n")
                    continue
                row = future.result()
                if method is None:
                    ready.add(name)
                    sys.stderr.write(f"vetted {name}\n")
                    continue
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                sys.stderr.write(f"{name}, {method}: {row['success']}, {row['accuracy']}, {row['outcome']}\n")


if __name__ == "__main__":
    main()
