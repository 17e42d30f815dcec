"""How well does a minimal-norm search repeat over seeds? The floor of the null's spread rests on this.

python -m benchmarks.repeatability --models DIR    (the `models` folder of a demo)
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks._record import RESULTS, heading
from guard.classifiers import load
from guard.demo.data import from_digits
from guard.triggers import FAMILIES
from guard.vetting import BUDGETS, reconstruct

SEEDS = range(5)


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    models = parser.parse_args().models
    images = from_digits(seed=0).vetting.pixels
    lines = [
        "| model | family | budget | sd of log norm over 5 seeds, pooled over 10 classes | largest class |",
        "| --- " * 5 + "|",
    ]
    for name in ("base", "clean-twin"):
        classifier = load(str(models / name))
        for family, kind in FAMILIES.items():
            for budget in ("quick", "standard"):
                norms = []
                for seed in SEEDS:
                    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
                    half = len(images) // 2
                    found = reconstruct(
                        classifier,
                        kind,
                        images[order[:half]],
                        images[order[half:]],
                        torch.arange(10),
                        replace(BUDGETS[budget], seed=seed),
                    )
                    norms.append([np.log(item.norm) for item in found])
                spread = np.std(norms, axis=0, ddof=1)
                pooled = np.sqrt((spread**2).mean())
                lines.append(f"| {name} | {family} | {budget} | {pooled:.3f} | {spread.max():.3f} |")
                sys.stderr.write(lines[-1] + "\n")
    text = heading("Repeatability of the minimal-norm search", "python -m benchmarks.repeatability --models DIR")
    (RESULTS / "repeatability.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
