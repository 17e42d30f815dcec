"""What k and the size of the bank do to screening; and what the reconstruction buys over density alone.

python -m benchmarks.neighbour --models DIR    (the `models` folder of a digits demo of seed 0)
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks._record import RESULTS, heading
from guard.classifiers import load
from guard.demo.data import from_digits
from guard.demo.models import attack_trigger
from guard.demo.recipes import ALPHA, DIGITS, TARGET
from guard.evaluation.statistics import Rate
from guard.screening import Banks, Screen, threshold

BANKS = (300, 1200)
NEIGHBOURS = (2, 4, 8, 16)


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    classifier = load(str(parser.parse_args().models / "backdoored"))
    data, trigger = from_digits(seed=0), attack_trigger(DIGITS, seed=0)
    order = torch.randperm(len(data.calibration), generator=torch.Generator().manual_seed(0))
    pixels = data.calibration.pixels[order]
    clean, stamped = classifier.embed(pixels).numpy(), classifier.embed(trigger.stamp(pixels)).numpy()
    requests = classifier.embed(data.requests.pixels).numpy()
    others = data.requests.pixels[data.requests.labels != TARGET]
    triggered = classifier.embed(trigger.stamp(others)).numpy()
    head = classifier.head.numpy().T
    lines = [
        "Stamped bank made with the attacker's own trigger, so that only k and the bank differ.",
        "",
        "| score | bank | k | clean flagged | triggered flagged |",
        "| --- " * 5 + "|",
    ]
    for size in BANKS:
        for k in NEIGHBOURS:
            for name, banks in (("trigger match", {"true": stamped[:size]}), ("k-distance alone", {})):
                screen = Screen(Banks.fit(clean[:size], banks, head, k=k))
                value = threshold(screen.score_samples(clean[max(BANKS) : 2 * max(BANKS)]).values, ALPHA).value
                rates = [
                    Rate.of(int(np.sum(screen.score_samples(part).values > value)), len(part))
                    for part in (requests, triggered)
                ]
                lines.append(f"| {name} | {size} | {k} | {rates[0]} | {rates[1]} |")
    text = heading(f"k and the bank, digits, α = {ALPHA:g}, seed 0", "python -m benchmarks.neighbour --models DIR")
    (RESULTS / "neighbour.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
