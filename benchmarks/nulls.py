"""How widely do the classes of clean models spread? Writes the table that moderates p-values.

python -m benchmarks.nulls --measured FILE [--only probes|families|FAMILY] [--kinds base derived classes towers]
    [--add] ZOO...
python -m benchmarks.nulls --measured FILE --compare DIR

Measures what FILE lacks, then writes what it has into guard/vetting/nulls.json; entries that it has nothing for stay,
but for those of steps at which `quick` no longer stops.
With --only FAMILY one family is measured anew, for instance after its search has changed. Rows of FILE do not say how
many images a step had: start a new FILE then.
With --add it is added to the models that an entry was made of, which must have as many classes.
Prompt learners (`benchmarks.prompts`) are compared with prompts that are tuned anew on their towers, kind `towers`.
With --compare the table stays, and a result in DIR says how what was measured compares with it.
"""

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._record import heading, read_rows
from guard._files import replace_file
from guard.classifiers import Classifier, load
from guard.classifiers.files import LEARNER_FILE
from guard.classifiers.prompts import PromptedClassifier
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.triggers import FAMILIES
from guard.vetting import BUDGETS, DerivedReferenceSettings, Inspector, Lead, derive_reference
from guard.vetting.batches import halves
from guard.vetting.inspection import divided
from guard.vetting.nulls import Largest, Prior, estimate, joined, pooled, prior
from guard.vetting.probes import listed_probes, probe_classes
from guard.vetting.reference import fresh_prompts
from guard.vetting.results import PROBES, ReferenceKind

QUICK = BUDGETS["quick"].inspection
"""Priors are those of half and of all of its steps; larger budgets take the last."""
IMAGES = 1000
TABLE = Path(__file__).parents[1] / "guard" / "vetting" / "nulls.json"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--models", default="*")
    parser.add_argument("--only", choices=("probes", "families", *FAMILIES), help="Default: both.")
    parser.add_argument("--kinds", nargs="+", default=["derived", "base", "classes", "towers"])
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--add", action="store_true")
    parser.add_argument("zoos", type=Path, nargs="*")
    arguments = parser.parse_args()
    known = read_rows(arguments.measured)
    for root in arguments.zoos:
        zoo = Zoo.read(root)
        for name in zoo.select(arguments.models):
            truth = zoo.truth(name)
            for kind in _kinds(zoo, name, arguments.only):
                if (
                    kind in arguments.kinds
                    and truth
                    and truth.label == "clean"
                    and (_title(zoo), name, kind) not in {(row["zoo"], row["name"], row["kind"]) for row in known}
                ):
                    known.append(_measure(zoo, name, kind, arguments.only))
                    with arguments.measured.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(known[-1]) + "\n")
    if arguments.compare:
        compare(known, arguments.compare)
        return
    replace_file(TABLE, (json.dumps(_table(known, add=arguments.add), indent=1) + "\n").encode())


def _table(rows: list[dict[str, Any]], *, add: bool) -> dict[str, Any]:
    """The shipped table with what was measured, in place of its entries or added to them."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    priors, maxima = fit(rows)
    sources, entries, largest = (dict(table[part]) for part in ("source", "priors", "largest"))
    measured = _sources(rows)
    for part, (_, zoos) in measured.items():
        there = set(re.split(r", | zoos |; \d+ of ", sources.get(part, ""))) & set(zoos.split(", "))
        if add and there:
            raise SystemExit(f"{part}: models of {', '.join(sorted(there))} are in the table already")
    groups = _classes(rows) - 1
    for key, found in priors.items():
        name = "/".join(map(str, key))
        known = Prior(**entries[name]) if add and name in entries else None
        entries[name] = asdict(joined(known, found, groups) if known else found)
    for pair, maximum in maxima.items():
        name = "/".join(pair)
        before = Largest(**largest[name]) if add and name in largest else None
        largest[name] = asdict(_together(before, maximum) if before else maximum)
    steps = {f"/{family}/{count}" for family in FAMILIES for count in _steps(family)}
    entries = {name: each for name, each in entries.items() if name[name.index("/") :] in {*steps, f"/{PROBES}/0"}}
    for part, (count, zoos) in measured.items():
        text = f"python -m benchmarks.nulls, {count} clean models of the zoos {zoos}"
        sources[part] = f"{sources[part]}; {count} of {zoos}" if add and part in sources else text
    parts = {"source": sources, "priors": entries, "largest": largest}
    return {part: dict(sorted(each.items())) for part, each in parts.items()}


def _together(first: Largest, second: Largest) -> Largest:
    models, mean, variance = pooled(*((each.models, each.mean, each.deviation**2) for each in (first, second)))
    return Largest(mean, variance**0.5, models)


def _classes(rows: list[dict[str, Any]]) -> int:
    """How many classes the models have: as many each."""
    counts = {len(values) for row in rows for key, values in row.items() if isinstance(values, list)}
    if len(counts) != 1:
        raise SystemExit(f"models of {sorted(counts)} classes cannot be added to one table; measure them apart")
    return counts.pop()


def _title(zoo: Zoo) -> str:
    return f"{zoo.name} of seed {zoo.seed}"


def _kinds(zoo: Zoo, name: str, only: str | None) -> list[ReferenceKind]:
    """What a model can be compared with."""
    if (zoo.model(name) / LEARNER_FILE).exists():
        return ["towers"]
    kinds: list[ReferenceKind] = ["derived"]
    if zoo.models[name].base:
        kinds.append("base")
    if only in {None, PROBES}:
        kinds.append("classes")
    return kinds


def _steps(family: str) -> tuple[int, int]:
    """Half and all of the steps of a family."""
    steps = divided(QUICK, family).steps
    return steps // 2, steps


def _measure(zoo: Zoo, name: str, kind: ReferenceKind, only: str | None) -> dict[str, Any]:
    """The statistics of all families and classes of one model, on a split that vetting would make."""
    began = time.monotonic()
    classifier = load(str(zoo.model(name)))
    entry = zoo.models[name]
    images = pixels(
        ImageSet.of_zoo(zoo.root / "images" / entry.images, vetting=IMAGES, seed=0), classifier.preprocessing
    ).vetting
    searched, _ = halves(images, seed=0)
    reference_model = _reference_model(zoo, name, classifier, searched, kind)
    lead, targets = Lead(classifier, searched, reference_model), torch.arange(len(classifier.classes.names))
    row: dict[str, Any] = {"name": name, "kind": kind, "label": "clean", "zoo": _title(zoo)}
    if only in {None, PROBES}:
        row[PROBES] = probe_classes(
            classifier, searched, listed_probes(), reference_model=reference_model
        ).statistics.tolist()
    families = [family for family in FAMILIES if kind != "classes" and only in {None, "families", family}]
    for family in families:
        inspector = Inspector(lead, FAMILIES[family], targets, divided(QUICK, family))
        for steps in _steps(family):
            row[f"{family}/{steps}"] = [item.lead for item in inspector.run(steps, targets.tolist())]
    sys.stderr.write(f"{name}, {kind}: {time.monotonic() - began:.0f} s\n")
    return row


def _reference_model(
    zoo: Zoo, name: str, classifier: Classifier, searched: torch.Tensor, kind: ReferenceKind
) -> Classifier | None:
    if kind == "classes":
        return None
    if kind == "derived":
        return derive_reference(classifier, searched, DerivedReferenceSettings())[0]
    base = load(str(zoo.model(str(zoo.models[name].base))))
    if kind == "towers" and isinstance(classifier, PromptedClassifier):
        return fresh_prompts(classifier, searched, DerivedReferenceSettings(), towers=base)[0]
    return base


def fit(rows: list[dict[str, Any]]) -> tuple[dict[tuple[str, str, int], Prior], dict[tuple[str, str], Largest]]:
    """The priors, by kind of reference model, family and steps; and the largest statistics of probes."""
    variances: dict[tuple[str, str, int], list[tuple[float, int]]] = defaultdict(list)
    maxima: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        searched = [(family, steps, f"{family}/{steps}") for family in FAMILIES for steps in _steps(family)]
        for family, steps, key in [*searched, (PROBES, 0, PROBES)]:
            values = np.asarray(row.get(key, []), float)
            values = values[~np.isnan(values)]
            if row["label"] == "clean" and len(values) > 1:
                variances[row["kind"], family, steps].append((float(values.var(ddof=1)), len(values) - 1))
                if family == PROBES:
                    maxima[row["kind"], family].append(float(values.max()))
    return (
        {key: estimate(*zip(*found, strict=True)) for key, found in variances.items()},
        {key: Largest(float(np.mean(each)), float(np.std(each, ddof=1)), len(each)) for key, each in maxima.items()},
    )


def compare(rows: list[dict[str, Any]], out: Path) -> None:
    """Write how the spread among classes of other clean models compares with the shipped table."""
    kinds = ", ".join(sorted({row["kind"] for row in rows}))
    zoos = ", ".join(sorted({row["zoo"] for row in rows}))
    about = (
        f"{len(rows)} clean models of the zoos {zoos}; reference: {kinds}. A deviation is the typical standard "
        "deviation of the statistic among the classes of a clean model; the degrees say how far it is alike for all."
    )
    lines = [
        about,
        "",
        "| reference | family | steps | models of the table | deviation, degrees | here | ratio of the deviations |",
        "| --- " * 7 + "|",
    ]
    for (kind, family, steps), here in sorted(fit(rows)[0].items()):
        table = prior(kind, family, steps)
        lines.append(
            f"| {kind} | {family} | {steps} | {table.models} | {table.variance**0.5:.3f}, {table.degrees:.1f} | "
            f"{here.variance**0.5:.3f}, {here.degrees:.1f} | {(here.variance / table.variance) ** 0.5:.2f} |"
        )
    text = heading(
        "Nulls on other clean models", "python -m benchmarks.nulls --measured FILE --compare benchmarks/results"
    )
    (out / "nulls-compared.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def _sources(rows: list[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """How many models of which zoos were measured, by kind of reference model and part of the table."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in rows:
        for part in _parts(row) if row["label"] == "clean" else ():
            found[f"{row['kind']}/{part}"].add((row["zoo"], row["name"]))
    return {part: (len(models), ", ".join(sorted({zoo for zoo, _ in models}))) for part, models in found.items()}


def _parts(row: dict[str, Any]) -> list[str]:
    """What of the table a row is of: probes, and all families or single ones."""
    searched = [family for family in FAMILIES if f"{family}/{_steps(family)[0]}" in row]
    return [*([PROBES] if PROBES in row else ()), *(["families"] if len(searched) == len(FAMILIES) else searched)]


if __name__ == "__main__":
    main()
