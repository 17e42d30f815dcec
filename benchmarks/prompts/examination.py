"""What vetting and screening make of a zoo of prompt learners.

    python -m benchmarks.prompts.examination run --part reported --zoo ZOO --measured FILE [--only PATTERN] [--fresh]
    python -m benchmarks.prompts.examination report --measured FILE

`run` builds each learner that is missing (`benchmarks.prompts.zoo`) and examines it: vetting with the budget `quick`
against the hand-written prompts (with --fresh, against prompts that are tuned anew on the learner's answers), and
screening of a poisoned learner at a false-alarm rate of 1 %, with the second opinion of the hand-written prompts,
without it, and by the embedding of the image tower alone. Each (learner, reference) is a line of FILE, and is not
measured again.
`report` writes benchmarks/results/prompts.md.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prompts.report import write
from benchmarks.prompts.zoo import PARTS, TOWERS, build, data_of, items
from guard.classifiers import Classifier, load
from guard.demo.data import DemoData
from guard.evaluation import Zoo
from guard.profiles import Profile
from guard.profiles.calibrating import ask
from guard.vetting import Vetting, vet
from guard.vetting.verdict import suspicion

FAMILIES = ("additive", "frequency", "patch")
"""Families that are inspected: the additive one of CLIP-Inspector, that of sinusoids, and one that is local."""
ALPHA = 0.01
_CALIBRATION = 1000


def run(part: str, folder: Path, path: Path, only: str, *, fresh: bool) -> None:
    """Build and examine what is missing."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    known = {(row["name"], row["reference"]) for row in rows}
    _, data = data_of()
    reference = "fresh" if fresh else "hand-written"
    for item in items(part):
        if fnmatchcase(item.name, only) and (item.name, reference) not in known:
            build(part, folder, item.name)
            row = examine(Zoo.read(folder), item.name, data, fresh=fresh)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            sys.stderr.write(f"{row}\n")


def examine(zoo: Zoo, name: str, data: DemoData, *, fresh: bool) -> dict[str, Any]:
    """Vet a learner, and screen requests to it if it was poisoned."""
    classifier = load(str(zoo.model(name)), device="cpu")
    towers = load(str(zoo.model(f"towers-{TOWERS}")), device="cpu")
    known = json.loads((zoo.root / "truth" / f"{name}.json").read_text(encoding="utf-8"))
    started, used = time.monotonic(), time.process_time()
    base = None if fresh else towers
    found = vet(
        classifier,
        data.vetting.pixels,
        base=base,
        families=FAMILIES,
        budget="quick",
        repeats=1,
        cache=zoo.root / "searches",
    )
    leading, p_value = suspicion(found.results, found.checks)
    row = {
        "name": name,
        "reference": "fresh" if fresh else "hand-written",
        **{key: known[key] for key in ("family", "kind", "adaptive", "label", "accuracy", "success", "targets")},
        "by_hand": known["towers"],
        "verdict": found.verdict.outcome,
        "leading": leading,
        "p_value": p_value,
        "passes": found.passes,
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "triggers": [each.target for each in found.triggers],
    }
    if known["targets"] and not fresh:
        row["screening"] = screened(zoo, name, classifier, towers, found, data)
    return row


def screened(
    zoo: Zoo, name: str, classifier: Classifier, towers: Classifier, vetting: Vetting, data: DemoData
) -> dict[str, Any]:
    """How many triggered and how many clean requests each way to screen flags."""
    (planted,) = zoo.triggers(name, zoo.truth(name))  # type: ignore[arg-type]  # poisoned learners have a truth
    calibration = data.calibration.pixels[np.random.default_rng(0).permutation(len(data.calibration))[:_CALIBRATION]]
    requests = data.requests
    stamped = planted.trigger.stamp(requests.pixels[requests.labels != planted.target])
    ways = {
        "token, answer and second opinion": (classifier, vetting, towers),
        "token and answer": (classifier, vetting, None),
        "image embedding alone": (towers, _of_towers(vetting, towers), None),
    }
    found: dict[str, Any] = {}
    # Only triggered requests that do lead to the target are counted.
    hit = (classifier.predict(classifier.embed(stamped)) == planted.target).numpy()
    for way, (model, used, opinion) in ways.items():
        profile = Profile.build(model, used).calibrate(model, calibration, ALPHA, reference=opinion)
        detector = profile.detector()
        flags = [
            detector.score(model.embed(each).numpy(), None if opinion is None else ask(opinion, each)).flags
            for each in (requests.pixels, stamped)
        ]
        found[way] = {
            "false_alarms": [int(flags[0].sum()), len(flags[0])],
            "detected": [int(flags[1][hit].sum()), int(hit.sum())],
        }
    return found


def _of_towers(vetting: Vetting, towers: Classifier) -> Vetting:
    """The same triggers, with the part of their features that the image tower gives."""
    width = towers.head.shape[1]
    return replace(vetting, triggers=tuple(replace(each, feature=each.feature[:width]) for each in vetting.triggers))


def main() -> None:
    """Run what is missing, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--part", choices=PARTS, default="reported")
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--only", default="*", help="Shell pattern of the names of the learners.")
    parser.add_argument("--fresh", action="store_true", help="Compare with freshly tuned prompts.")
    parser.add_argument("--note", default="", help="What to say in the report of what was measured.")
    arguments = parser.parse_args()
    if arguments.what == "run":
        if arguments.zoo is None:
            parser.error("run needs --zoo")
        run(arguments.part, arguments.zoo, arguments.measured, arguments.only, fresh=arguments.fresh)
    else:
        rows = [json.loads(line) for line in arguments.measured.read_text(encoding="utf-8").splitlines()]
        write(rows, arguments.part, arguments.note)


if __name__ == "__main__":
    main()
