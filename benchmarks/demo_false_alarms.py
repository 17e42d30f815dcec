"""How many clean requests the demo flags, over many random choices of calibration images and requests.

python -m benchmarks.demo_false_alarms --models 6 --draws 10 --folder /tmp/false-alarms

Each model is trained and vetted as the demo does it. Then the digits that neither has seen are drawn anew, again and
again: 500 of them to calibrate, and the other 297 as clean requests, all in six colourings (the demo sends two).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import guard
from benchmarks._record import RESULTS, heading
from guard.demo import digits
from guard.demo.data import from_digits
from guard.demo.models import attack_trigger, train_models
from guard.demo.recipes import ALPHA, DIGITS, TARGET
from guard.screening import Banks, Screen, calibration, default_k, threshold

CALIBRATION_DIGITS, RENDERINGS, FIRST_UNSEEN = 500, 6, 1000

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Unseen:
    """Embeddings of the digits that a model and its vetting have not seen.

    Attributes:
        clean: Embeddings of all renderings, shape [N, D].
        stamped: For each reconstructed trigger its target, and embeddings of the same images with it.
        attacked: Embeddings of the same images with the attacker's own trigger.
        original: Which digit each image shows, shape [N].
        labels: Class of each image, shape [N].
        head: Class embeddings, shape [D, C].
    """

    clean: Array
    stamped: dict[str, tuple[int, Array]]
    attacked: Array
    original: NDArray[np.int64]
    labels: NDArray[np.int64]
    head: Array


@dataclass(frozen=True)
class Draw:
    """Shares of the requests of one draw.

    Attributes:
        alarms: Clean requests that are flagged.
        pooled: The same, had all renderings of a calibration digit set the threshold and not one of them.
        detected: Requests with the attacker's trigger that are flagged.
        left_out: Number of calibration images that were left out, since they seem to carry a trigger.
    """

    alarms: float
    pooled: float
    detected: float
    left_out: int


def prepare(seed: int, folder: Path) -> Unseen:
    """Train and vet the demo's model of a seed, and embed what it has not seen."""
    data = from_digits(seed=seed)
    models = train_models(data, DIGITS, folder / f"seed-{seed}", seed=seed, device="cpu", say=print)
    suspect, base = models["backdoored"].classifier, models["base"].classifier
    cache = folder / f"seed-{seed}" / "searches"
    vetting = guard.vet(suspect, data.vetting.pixels, base=base, budget=DIGITS.budget, seed=seed, cache=cache)
    profile = guard.Profile.build(suspect, vetting)
    images, original = digits.digits(RENDERINGS, seed=seed)
    unseen = original >= FIRST_UNSEEN
    pixels = images.pixels[unseen]
    targets = {record.id: record.target for record in profile.document.triggers}
    return Unseen(
        suspect.embed(pixels).numpy(),
        {
            name: (targets[name], suspect.embed(trigger.stamp(pixels)).numpy())
            for name, trigger in profile.load_triggers().items()
        },
        suspect.embed(attack_trigger(DIGITS, seed=seed).stamp(pixels)).numpy(),
        original[unseen].numpy(),
        images.labels[unseen].numpy(),
        np.ascontiguousarray(suspect.head.float().numpy().T),
    )


def draw(unseen: Unseen, seed: int) -> Draw:
    """Calibrate with some of the digits, and score the others."""
    order = np.random.default_rng(seed).permutation(np.unique(unseen.original))
    chosen = np.isin(unseen.original, order[:CALIBRATION_DIGITS])
    rows = np.flatnonzero(chosen)
    parts = calibration.split(unseen.original[rows], seed)
    banks, in_banks = _banks(unseen, rows[parts.banks])
    found = calibration.calibrate(banks, unseen.clean[rows[parts.threshold]], unseen.clean[rows[parts.held_out]], ALPHA)
    screen = Screen(banks)
    alike = np.isin(unseen.original, unseen.original[rows[parts.threshold]])
    pooled = threshold(screen.score_samples(unseen.clean[alike]).values, ALPHA)
    clean = screen.score_samples(unseen.clean[~chosen]).values
    attacked = screen.score_samples(unseen.attacked[~chosen & (unseen.labels != TARGET)]).values
    return Draw(
        float((clean > found.threshold.value).mean()),
        float((clean > pooled.value).mean()),
        float((attacked > found.threshold.value).mean()),
        len(in_banks) + len(found.left_out),
    )


def _banks(unseen: Unseen, rows: NDArray[np.int64]) -> tuple[Banks, dict[int, str]]:
    stamped = {name: (target, bank[rows]) for name, (target, bank) in unseen.stamped.items()}
    k = default_k(len(rows), unseen.head.shape[1])
    return calibration.fit_banks(unseen.clean[rows], stamped, unseen.head, k=k)


def _mean(values: list[float]) -> str:
    """Mean and 95 % interval, by the standard error of the draws."""
    error = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return f"{mean:.2%} ({max(0.0, mean - error):.2%} to {mean + error:.2%})"


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--folder", type=Path, required=True, help="Folder in which trained models are kept.")
    arguments = parser.parse_args()
    results = []
    for seed in range(arguments.models):
        unseen = prepare(seed, arguments.folder)
        results.append([draw(unseen, 1000 * seed + number) for number in range(arguments.draws)])
    everything = [item for drawn in results for item in drawn]
    lines = [
        (
            f"{len(everything)} draws of calibration images and requests: {arguments.draws} for each of "
            f"{arguments.models} models. α = {ALPHA:g}. Intervals of 95 % by the standard error over draws; draws of "
            "one model share its 797 digits."
        ),
        "",
        "| model | clean flagged | the same, threshold from all renderings | triggered flagged | left out |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, drawn in [*((str(seed), drawn) for seed, drawn in enumerate(results)), ("all", everything)]:
        lines.append(
            f"| {name} | {_mean([item.alarms for item in drawn])} | {_mean([item.pooled for item in drawn])} "
            f"| {np.mean([item.detected for item in drawn]):.1%} "
            f"| {np.mean([item.left_out for item in drawn]):.1f} images |"
        )
    rates = np.quantile([item.alarms for item in everything], [0.025, 0.5, 0.975])
    spread = ", ".join(f"{rate:.2%}" for rate in rates)
    deviation = float(np.std([item.alarms for item in everything], ddof=1))
    lines += [
        "",
        (
            f"The rate of single draws has a standard deviation of {100 * deviation:.2f} percentage points; its 2.5 %, "
            f"50 % and 97.5 % quantiles are {spread}."
        ),
    ]
    command = f"python -m benchmarks.demo_false_alarms --models {arguments.models} --draws {arguments.draws}"
    text = heading("False alarms of the demo", command) + "\n".join(lines) + "\n"
    (RESULTS / "demo-false-alarms.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
