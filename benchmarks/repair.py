"""Does a repair remove the attacker's own trigger, and what does it cost?

python -m benchmarks.repair ZOO --profiles FOLDER --measured FILE [--models PATTERN] [--methods NAMES] [--vet NAMES]

For zoos of digits. FOLDER has a profile of each model as `guard vet --base` wrote it; models without one are left out.
All methods get the same 400 labelled images, which the models were not trained on: 240 to train on, and 160 for choices
and the new vetting. `perturb-recover (3000)` gets 3,000 in their place, since it was made for many pairs. Accuracy and
attack success rate are measured on 594 other images. Each (model, method) is a line of FILE, and is not measured again.
Then benchmarks/results/repair.md is written.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks._record import RESULTS, heading
from guard.attacks import LabelledImages, Planted, measure
from guard.classifiers import load
from guard.demo.data import from_digits
from guard.evaluation import Zoo
from guard.evaluation.statistics import Rate
from guard.profiles import Profile
from guard.repair import (
    Candidate,
    Case,
    Guided,
    Images,
    PerturbRecover,
    Realign,
    Subtract,
    Switch,
    TargetedTrigger,
    drift,
)
from guard.repair.realign import realigned
from guard.triggers import Additive
from guard.vetting import vet

SMALL, LARGE = "vetting", "calibration"
_PAR = PerturbRecover()
PAR = replace(_PAR, tuning=replace(_PAR.tuning, steps=300, batch=128, learning_rate=1e-3))
"""The published batch and learning rate are for 250,000 pairs and large models."""
CLEAN_ONLY, NOISE, WRONG = "realign: clean images only", "realign: random noise", "realign: trigger of another class"
RUNS: dict[str, tuple[str, Callable[[Case], Iterator[Candidate]]]] = {
    "guided": (SMALL, Guided().candidates),
    "guided (no labels)": (SMALL, lambda case: Guided().candidates(_unlabelled(case))),
    "realign": (SMALL, Realign().candidates),
    "perturb-recover (3000)": (LARGE, PAR.candidates),
    "perturb-recover": (SMALL, PAR.candidates),
    "subtract": (SMALL, Subtract().candidates),
    "switch": (SMALL, Switch().candidates),
    CLEAN_ONLY: (SMALL, lambda case: _control(case, ())),
    NOISE: (SMALL, lambda case: _control(case, _noise(case))),
    WRONG: (SMALL, lambda case: _control(case, _of_another_class(case))),
}
"""For each row of the table the images that it gets, and what makes it."""


def main() -> None:
    """Run what is missing, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--models", default="*")
    parser.add_argument("--methods", default=",".join(RUNS))
    parser.add_argument(
        "--vet", default="", help="Methods whose models are vetted again (budget quick, against the base)."
    )
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    path: Path = arguments.measured
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    known = {(row["model"], row["method"]) for row in rows}
    zoo = Zoo.read(arguments.zoo)
    methods = [name for name in arguments.methods.split(",") if name]
    for name in zoo.select(arguments.models):
        if zoo.models[name].base is None or not (arguments.profiles / name / "profile.json").exists():
            continue
        for method in methods:
            if (name, method) in known:
                continue
            row = run(zoo, name, arguments.profiles / name, method, vetted=method in arguments.vet.split(","))
            if row is None:
                continue
            rows.append(row)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            sys.stderr.write(f"{row}\n")
    command = f"python -m benchmarks.repair {zoo.name} --models '{arguments.models}'"
    text = heading("Repair: methods, attacks and cost", command)
    (RESULTS / "repair.md").write_text(text + f"{arguments.note}\n\n" * bool(arguments.note) + report(rows), "utf-8")


def run(zoo: Zoo, name: str, folder: Path, method: str, *, vetted: bool) -> dict[str, Any] | None:
    """Repair one model by one method, and measure; None where the method has nothing to work with."""
    suspect, base = load(str(zoo.model(name))), load(str(zoo.model(str(zoo.models[name].base))))
    profile, data, truth = Profile.open(folder), from_digits(seed=0), zoo.truth(name)
    if truth is None or truth.label == "failed attack":
        return None
    planted = [Planted(each.trigger, each.target, 0.0, each.sources) for each in zoo.triggers(name, truth)]
    found = profile.load_triggers()
    triggers = tuple(TargetedTrigger(each.id, found[each.id], each.target) for each in profile.document.triggers)
    which, candidates = RUNS[method]
    labelled: LabelledImages = getattr(data, which)
    train, held_out = Images(labelled.pixels, labelled.labels).parts(0)
    case = Case(suspect, train, held_out, triggers, base, seed=0)
    if not triggers and not method.startswith(("perturb-recover", "switch", CLEAN_ONLY)):
        return None
    started = time.monotonic()
    candidate = next(candidates(case))
    seconds = time.monotonic() - started
    before, after = (measure(model, data.requests, planted) for model in (suspect, candidate.classifier))
    verdict = None
    if vetted:
        searched = data.vetting.pixels[
            torch.randperm(len(data.vetting), generator=torch.Generator().manual_seed(0))[:160]
        ]
        verdict = vet(candidate.classifier, searched, base=base, budget="quick").verdict.outcome
    moved = drift(suspect, candidate.classifier, held_out)
    return {
        "model": name,
        "family": truth.family,
        "label": truth.label,
        "verdict_before": profile.document.vetting.verdict.outcome,
        "method": method,
        "before": [before.accuracy, max(before.success, default=None)],
        "after": [after.accuracy, max(after.success, default=None)],
        "cosine": moved.cosine,
        "choices": candidate.choices,
        "passes": candidate.passes,
        "seconds": round(seconds, 1),
        "verdict": verdict,
    }


def _unlabelled(case: Case) -> Case:
    return replace(case, images=Images(case.images.pixels), held_out=Images(case.held_out.pixels))


def _control(case: Case, triggers: tuple[TargetedTrigger, ...]) -> Iterator[Candidate]:
    yield realigned(case, case.needs_labels("realign"), triggers, Realign())


def _noise(case: Case) -> tuple[TargetedTrigger, ...]:
    """Random signs of 16/255: as strong as the inspection lets an additive trigger be."""
    generator = torch.Generator().manual_seed(case.seed)
    signs = torch.randint(0, 2, case.suspect.image_shape, generator=generator).float() * 2 - 1
    return (TargetedTrigger("noise", Additive(signs * 16 / 255), 0),)


def _of_another_class(case: Case) -> tuple[TargetedTrigger, ...]:
    """The additive trigger that inspection finds for the class behind the target."""
    target = (case.triggers[0].target + 1) % len(case.suspect.classes.names)
    found, _ = Guided().search_for(case, [target], ["additive"])
    return tuple(found)


def report(rows: list[dict[str, Any]]) -> str:
    """The tables."""
    backdoored = [row for row in rows if row["label"] == "backdoored"]
    lines = ["## Backdoored models", ""]
    lines.append(
        "ASR is the attack success rate of the attacker's own trigger, on images of other classes that were used for "
        "nothing else. Accuracy is in percentage points against the model before the repair."
    )
    lines += ["", "| method | models | mean ASR after | worst ASR after | ASR ≤ 5 % | accuracy, mean change | worst |"]
    lines[-1] += " mean cosine to old embeddings | passes | seconds | new verdict `no evidence` |"
    lines.append("| --- " * 11 + "|")
    for method in RUNS:
        mine = [row for row in backdoored if row["method"] == method]
        if not mine:
            continue
        success = [row["after"][1] for row in mine]
        change = [100 * (row["after"][0] - row["before"][0]) for row in mine]
        judged = [row["verdict"] == "no evidence" for row in mine if row["verdict"]]
        cells = [
            method,
            str(len(mine)),
            f"{sum(success) / len(success):.1%}",
            f"{max(success):.1%}",
            Rate.of(sum(each <= 0.05 for each in success), len(mine)).brief,
            f"{sum(change) / len(change):+.2f}",
            f"{min(change):+.2f}",
            f"{_mean(mine, 'cosine'):.3f}",
            f"{_mean(mine, 'passes'):,.0f}",
            f"{_mean(mine, 'seconds'):.0f}",
            Rate.of(sum(judged), len(judged)).brief if judged else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "ASR after the repair by attack, in percent:", ""]
    methods = [method for method in RUNS if any(row["method"] == method for row in backdoored)]
    lines.append(f"| model | before | {' | '.join(methods)} |")
    lines.append("| --- " * (len(methods) + 2) + "|")
    for name in dict.fromkeys(row["model"] for row in backdoored):
        mine_by = {row["method"]: row for row in backdoored if row["model"] == name}
        first = next(iter(mine_by.values()))
        cells = [f"{100 * mine_by[method]['after'][1]:.1f}" if method in mine_by else "–" for method in methods]
        lines.append(f"| {name} | {100 * first['before'][1]:.1f} | {' | '.join(cells)} |")
    clean = [row for row in rows if row["label"] == "clean"]
    if clean:
        lines += ["", "## Clean models", ""]
        for method in dict.fromkeys(row["method"] for row in clean):
            mine = [row for row in clean if row["method"] == method]
            change = [100 * (row["after"][0] - row["before"][0]) for row in mine]
            lines.append(
                f"- {method} on {len(mine)}: accuracy changes by {min(change):+.2f} to {max(change):+.2f} points."
            )
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


if __name__ == "__main__":
    main()
