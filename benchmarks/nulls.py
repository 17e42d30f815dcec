"""How widely do the classes of clean models spread? Writes the table that moderates p-values.

python -m benchmarks.nulls --measured FILE ZOO...    (measures what FILE lacks, then writes guard/vetting/nulls.json)
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guard.classifiers import Classifier, load
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.triggers import FAMILIES
from guard.vetting import DerivedReferenceSettings, InspectionSettings, Inspector, Lead, derive_reference
from guard.vetting.batches import halves
from guard.vetting.nulls import Prior, estimate, write_table

STEPS = (16, 32)
"""Half and all of what the budget `standard` spends, and `quick` spends the first."""
IMAGES = 1000
TABLE = Path(__file__).parents[1] / "guard" / "vetting" / "nulls.json"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--models", default="*")
    parser.add_argument("zoos", type=Path, nargs="*")
    arguments = parser.parse_args()
    known = _read(arguments.measured)
    for root in arguments.zoos:
        zoo = Zoo.read(root)
        for name in zoo.select(arguments.models):
            truth = zoo.truth(name)
            kinds = ["derived", *(["base"] if zoo.models[name].base else [])]
            for kind in kinds:
                if (
                    truth
                    and truth.label == "clean"
                    and (name, kind) not in {(row["name"], row["kind"]) for row in known}
                ):
                    known.append(_measure(zoo, name, kind))
                    with arguments.measured.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(known[-1]) + "\n")
    write_table(TABLE, fit(known), _source(known))


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _measure(zoo: Zoo, name: str, kind: str) -> dict[str, Any]:
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
    row: dict[str, Any] = {"name": name, "kind": kind, "label": "clean"}
    for family, form in FAMILIES.items():
        inspector = Inspector(lead, form, targets, InspectionSettings(steps=max(STEPS)))
        for steps in STEPS:
            row[f"{family}/{steps}"] = [item.lead for item in inspector.run(steps, targets.tolist())]
    sys.stderr.write(f"{name}, {kind}: {time.monotonic() - began:.0f} s\n")
    return row


def _reference_model(zoo: Zoo, name: str, classifier: Classifier, searched: torch.Tensor, kind: str) -> Classifier:
    if kind == "derived":
        return derive_reference(classifier, searched, DerivedReferenceSettings())[0]
    return load(str(zoo.model(str(zoo.models[name].base))))


def fit(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], Prior]:
    """One prior for each kind of reference model, family and number of steps."""
    variances: dict[tuple[str, str, int], list[tuple[float, int]]] = defaultdict(list)
    for row in rows:
        if row["label"] != "clean":
            continue
        for family in FAMILIES:
            for steps in STEPS:
                values = np.asarray(row[f"{family}/{steps}"])
                variances[row["kind"], family, steps].append((float(values.var(ddof=1)), len(values) - 1))
    return {key: estimate(*zip(*found, strict=True)) for key, found in variances.items()}


def _source(rows: list[dict[str, Any]]) -> str:
    counts = {
        kind: len({row["name"] for row in rows if row["kind"] == kind and row["label"] == "clean"})
        for kind in ("base", "derived")
    }
    return f"python -m benchmarks.nulls, clean models of the zoos small and medium, first seed 0: {counts}"


if __name__ == "__main__":
    main()
