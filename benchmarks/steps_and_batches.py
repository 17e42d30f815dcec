"""How many steps and how large a radius an inspection needs: the lead of the attacker's class beside the others'.

python -m benchmarks.steps_and_radii ZOO MODEL … [--family patch] [--radii 3 6 9] [--steps 16 32 64] [--out DIR]

Budgets and radii were chosen on small towers that were trained from scratch. This measures one family on other models,
with their base, all classes and no early stop.
"""

import argparse
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


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="patch")
    parser.add_argument("--radii", type=float, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    zoo, radii = Zoo.read(given.zoo), given.radii or [RADII[given.family]]
    about = (
        f"Zoo `{zoo.name}` of seed {zoo.seed}, family {given.family} (guard's radius: {RADII[given.family]:g}), "
        f"{IMAGES} images, half of them searched on, seed 0, against the base. The p-value is of this family alone, "
        "corrected for the number of classes, without the shipped prior."
    )
    lines = [
        about,
        "",
        "| model | truth | radius | steps | lead of the attacker's class | largest other | p | of the class |",
        "| --- " * 8 + "|",
    ]
    for name in given.models:
        truth = zoo.truth(name)
        targets = list(truth.targets) if truth else []
        classifier, base = load(str(zoo.model(name))), load(str(zoo.model(str(zoo.models[name].base))))
        chosen = ImageSet.of_zoo(zoo.root / "images" / zoo.models[name].images, vetting=IMAGES, seed=0)
        searched, _ = halves(pixels(chosen, classifier.preprocessing).vetting, seed=0)
        every = list(range(len(classifier.classes.names)))
        for radius in radii:
            settings = InspectionSettings(steps=max(given.steps))
            inspector = Inspector(
                Lead(classifier, searched, base), FAMILIES[given.family], torch.tensor(every), settings
            )
            for steps in given.steps:
                with patch("guard.vetting.inspection.RADII", {**RADII, given.family: radius}):
                    leads = [found.lead for found in inspector.run(steps, every)]
                p_values = outliers(leads, NO_PRIOR)[1] * len(every)
                own = ", ".join(f"{leads[target]:.2f}" for target in targets) or "–"
                others = max(lead for target, lead in enumerate(leads) if target not in targets)
                first = int(p_values.argmin())
                lines.append(
                    f"| {name} | {truth.label if truth else ''} | {radius:g} | {steps} | {own} | {others:.2f} | "
                    f"{p_values[first]:.2g} | {first}{' ✓' if first in targets else ''} |"
                )
    text = heading("Steps and radii", f"python -m benchmarks.steps_and_radii {zoo.name} --family {given.family}")
    (given.out / f"steps-and-radii-{zoo.name}-{zoo.seed}-{given.family}.md").write_text(
        text + "\n".join(lines) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
