"""How well a scan finds poisoned pairs, in the sets that `benchmarks.scan.training` made.

python -m benchmarks.scan.detection --sets DIR
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._record import RESULTS, heading
from benchmarks.scan.training import KINDS
from guard.evaluation.statistics import Rate, auroc
from guard.scan.captions import Captions
from guard.scan.fine import examine_set
from guard.scan.results import ScanSettings
from guard.scan.scores import Sampled, released
from guard.scan.vectors import Unit

SETTINGS = ScanSettings()
SCORES = ("k-distance", "slof", "lid", "dao")
_ABOUT = """\
30,000 pairs at 32 px each, on which a small CLIP (ResNet of width 16, text tower of width 64) was trained from scratch
for 6 epochs, with captions from 16 templates. Each set has 50 copies of a placeholder, 50 of a photograph and 50
pictures of noise, with random captions. Seeds are 0. Constants of groups were chosen on cifar10, badnets-medium, 1 %,
whose figures are therefore no test; all other sets are.
"""


def as_released(image: NDArray[np.float32], text: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """The scores of the released code, in random batches."""
    order = np.random.default_rng(SETTINGS.seed).permutation(len(image))
    found = {name: np.zeros(len(image)) for name in SCORES}
    for part in np.array_split(order, -(-len(image) // SETTINGS.batch)):
        for name, values in released(image[part], text[part], SETTINGS.k).items():
            found[name][part] = values
    return found


def ranking(label: str, scores: NDArray[np.float64], kinds: NDArray[np.int64]) -> str:
    """One row: how well a score ranks poisoned pairs above clean ones."""
    poisoned, clean = scores[kinds == 1], scores[kinds == 0]
    area = auroc(poisoned.tolist(), clean.tolist())
    rates = [float((clean >= np.quantile(poisoned, 1 - share, method="lower")).mean()) for share in (0.95, 1.0)]
    return f"| {label} | {area.brief} | {rates[0]:.2%} | {rates[1]:.2%} |"


def one(folder: Path) -> str:
    """The section of one set."""
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    stored, pairs = np.load(folder / "embeddings.npz"), np.load(folder / "pairs.npz")
    image, text, kinds, pixels = stored["image"], stored["text"], pairs["kinds"], pairs["pixels"]
    captions = pairs["captions"].tolist()
    device = torch.device("cpu")
    sampled = Sampled([image], SETTINGS.sample, SETTINGS.draws, SETTINGS.k, seed=SETTINGS.seed, device=device)
    ours = sampled.scores(image, 0)
    coarse = ours[SETTINGS.method]
    stated = Captions([(lambda: captions, partial(list, [""] * len(image)))], [len(image)])
    _, groups, probabilities = examine_set(
        [Unit(image)], coarse, stated, lambda rows: {int(row): pixels[row] for row in rows}, SETTINGS, device
    )
    accused = [group for group in groups if group.kind in ("trigger", "suspected")]
    removed = np.zeros(len(image), bool)
    for group in accused:
        removed[list(group.pairs)] = True
    kept = np.flatnonzero(~removed)
    (folder / "keep.txt").write_text("".join(f"{row}\n" for row in kept), encoding="utf-8")
    final = np.argsort(np.argsort(coarse)) / len(coarse)
    for row, value in probabilities.items():
        final[row] += value
    success = f", attack success rate {record['success'][0]:.1%}" if record["success"] else ""
    lines = [
        f"## {record['data']}, {record['trigger'] or 'no poison'}, {100 * record['rate']:g} %\n",
        f"{record['poisoned']} of {record['pairs']} pairs are poisoned; accuracy {record['accuracy']:.1%}{success}.\n",
    ]
    if record["poisoned"]:
        lines += ["| score | AUROC | FPR at TPR 95 % | FPR at TPR 100 % |", "| --- | --- | --- | --- |"]
        lines += [ranking(f"as released, {name}", values, kinds) for name, values in as_released(image, text).items()]
        lines += [ranking(f"samples, {name}", ours[name], kinds) for name in SCORES]
        lines += [ranking("samples, then groups", final, kinds), ""]
    hit, all_removed, poisoned = int((removed & (kinds == 1)).sum()), int(removed.sum()), record["poisoned"]
    if all_removed:
        lines.append(f"- precision of the cut: {Rate.of(hit, all_removed).brief}")
    if poisoned:
        lines.append(f"- recall of the cut: {Rate.of(hit, poisoned).brief}")
    low = sum(group.low for group in groups if group.kind == "trigger")
    count, high = (sum(getattr(group, name) for group in accused) for name in ("count", "high"))
    lines.append(f"- estimated number of poisoned pairs: {count} ({low} to {high}); true: {poisoned}")
    lines.append(
        f"- clean pairs removed: {Rate.of(int((removed & (kinds == 0)).sum()), int((kinds == 0).sum())).brief}"
    )
    for number, kind in enumerate(KINDS[2:], 2):
        lines.append(f"- {kind}: {int(removed[kinds == number].sum())} of {int((kinds == number).sum())} removed")
    lines += [
        f"- group `{group.kind}`: {len(group.pairs)} pairs, word {group.word!r}, pattern "
        f"{group.pattern.excess if group.pattern else 0:.1f}, of which "
        + ", ".join(f"{int((kinds[list(group.pairs)] == k).sum())} {name}" for k, name in enumerate(KINDS))
        for group in groups
        if group.kind != "cluster"
    ]
    if (folder / "cleaned.json").exists():
        cleaned = json.loads((folder / "cleaned.json").read_text(encoding="utf-8"))
        lines.append(
            f"- trained again on what was kept ({cleaned['removed']} removed, {cleaned['left']} poisoned left): "
            f"accuracy {record['accuracy']:.1%} → {cleaned['accuracy']:.1%}, attack success rate "
            f"{record['success'][0]:.1%} → {cleaned['success'][0]:.1%} (of 9,000 test images)"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Scan sets and write the result; sections that are there already and are not asked for stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--only", default="*", help="shell pattern of the names of sets")
    arguments = parser.parse_args()
    for record in sorted(arguments.sets.glob(f"{arguments.only}/record.json")):
        part = one(record.parent)
        record.with_name("detection.md").write_text(part, encoding="utf-8")
        sys.stdout.write(part)
    parts = [path.read_text(encoding="utf-8") for path in sorted(arguments.sets.glob("*/detection.md"))]
    title = heading("Poisoned pairs that a scan finds", "python -m benchmarks.scan.detection --sets DIR")
    (RESULTS / "scan-detection.md").write_text("\n".join([title + _ABOUT, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
