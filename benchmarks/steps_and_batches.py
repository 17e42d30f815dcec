"""Steps, batches, radii and grids of an inspection: the lead of the attacker's class beside the others'.

python -m benchmarks.steps_and_batches ZOO MODEL … [--families patch "large patch"] [--radii 3] [--efforts 16x32 64x8]

Budgets and radii were chosen on small towers that were trained from scratch. This measures other models, with their
base, all classes and no early stop. Rows are printed as they come.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks._record import RESULTS, heading
from guard.classifiers import load
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.triggers import FAMILIES
from guard.vetting.batches import halves
from guard.vetting.budgets import InspectionSettings
from guard.vetting.inspection import RADII, Inspector
from guard.vetting.lead import Lead
from guard.vetting.nulls import NO_PRIOR, outliers

IMAGES = 1000
AVERAGED = 128
"""Number of images over which the lead is averaged, in batches of any size."""
HEADER = (
    "| model | truth | family | radius | steps × images | lead of the attacker's class | mean of the others | largest "
    "| p | of the class |"
)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--families", choices=sorted(FAMILIES), nargs="+", default=["patch", "large patch"])
    parser.add_argument("--radii", type=float, nargs="+")
    parser.add_argument("--efforts", nargs="+", default=["16x32", "64x8"], help="Steps x images in each.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo.read(given.zoo)
    efforts = [tuple(map(int, effort.split("x"))) for effort in given.efforts]
    about = (
        f"Zoo `{zoo.name}` of seed {zoo.seed}, {IMAGES} images, half of them searched on, seed 0, against the base. "
        "The p-value is of this family alone, corrected for the number of classes, without the shipped prior. Efforts "
        "of the same product take the same passes."
    )
    lines = [about, "", HEADER, "| --- " * 10 + "|"]
    for name in given.models:
        truth = zoo.truth(name)
        targets = list(truth.targets) if truth else []
        classifier, base = load(str(zoo.model(name))), load(str(zoo.model(str(zoo.models[name].base))))
        chosen = ImageSet.of_zoo(zoo.root / "images" / zoo.models[name].images, vetting=IMAGES, seed=0)
        searched, _ = halves(pixels(chosen, classifier.preprocessing).vetting, seed=0)
        every = list(range(len(classifier.classes.names)))
        for family in given.families:
            for radius in given.radii or [RADII[family]]:
                for steps, batch in efforts:
                    settings = InspectionSettings(steps, batch, average=max(1, AVERAGED // batch))
                    lead = Lead(classifier, searched, base)
                    inspector = Inspector(lead, FAMILIES[family], torch.tensor(every), settings)
                    with patch("guard.vetting.inspection.RADII", {**RADII, family: radius}):
                        leads = [found.lead for found in inspector.run(steps, every)]
                    p_values = outliers(leads, NO_PRIOR)[1] * len(every)
                    own = ", ".join(f"{leads[target]:.2f}" for target in targets) or "–"
                    others = [value for target, value in enumerate(leads) if target not in targets]
                    first = int(p_values.argmin())
                    label = truth.label if truth else ""
                    lines.append(
                        f"| {name} | {label} | {family} | {radius:g} | {steps} × {batch} | {own} "
                        f"| {sum(others) / len(others):.2f} | {max(others):.2f} | {p_values[first]:.2g} "
                        f"| {first}{' ✓' if first in targets else ''} |"
                    )
                    sys.stderr.write(lines[-1] + "\n")
    text = heading("Steps, batches, radii and grids", f"python -m benchmarks.steps_and_batches {zoo.name}")
    (given.out / f"steps-and-batches-{zoo.name}-{zoo.seed}.md").write_text(
        text + "\n".join(lines) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
