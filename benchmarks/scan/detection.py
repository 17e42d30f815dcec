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
On each set a small CLIP was trained from scratch, at 32 px, with captions from 16 templates: `resnet` has an image
tower of width 16, `vit` one of 2 layers of width 96 with patches of 8. Each set has 50 copies of a placeholder, 50 of a
photograph and 50 pictures of noise, with random captions. Constants of `guard.scan` were chosen on sets with the seed
0, whose figures are therefore no test; no constant was chosen on those with the seed 1. Two of these (blended 5 %,
badnets-large 1 %), of which nothing was found before, were the reason to look at pixels, and the rule that a trigger
seen through several words counts once, which changes the estimate alone, was made after two of them. Where the attack
success rate is low, the attack did not take. The sets of Tiny-ImageNet have 40 of its classes unless they say 200.
"""
_COLUMNS = ("set", "tower", "pairs", "poisoned", "accuracy", "attack success", "AUROC as released, k-distance", "DAO",
            "AUROC of ours, k-distance", "after groups", "FPR at TPR 95 %", "at 100 %", "precision", "recall",
            "estimate", "clean removed")  # fmt: skip


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


def table_line(record: dict[str, Any], ranked: dict[str, str], cut: dict[str, str]) -> str:
    """The set's line in the table of all sets."""
    kind = f"{record.get('classes') or 200} classes" if record["data"] == "tiny-imagenet" else ""
    areas = {label: line.split("|")[2].split()[0] for label, line in ranked.items()}
    last = ranked["samples, then groups"].split("|") if ranked else []
    cells = (
        f"{record['data']} {kind} {record['trigger'] or 'no poison'} {100 * record['rate']:g} %, {record['seed']}",
        record.get("tower", "resnet"), record["pairs"], record["poisoned"], f"{record['accuracy']:.0%}",
        f"{record['success'][0]:.0%}" if record["success"] else "",
        *(areas.get(label, "") for label in ("as released, k-distance", "as released, dao", "samples, k-distance",
                                             "samples, then groups")),
        last[3].strip() if last else "", last[4].strip() if last else "", *cut.values(),
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


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
        f"## {record['data']}, {record['trigger'] or 'no poison'}, {100 * record['rate']:g} %, seed {record['seed']}\n",
        f"{record['poisoned']} of {record['pairs']} pairs are poisoned; accuracy {record['accuracy']:.1%}{success}.\n",
    ]
    ranked: dict[str, str] = {}
    if record["poisoned"]:
        scores = {f"as released, {name}": values for name, values in as_released(image, text).items()}
        scores |= {f"samples, {name}": ours[name] for name in SCORES} | {"samples, then groups": final}
        ranked = {label: ranking(label, values, kinds) for label, values in scores.items()}
        lines += ["| score | AUROC | FPR at TPR 95 % | FPR at TPR 100 % |", "| --- | --- | --- | --- |"]
        lines += [*ranked.values(), ""]
    hit, all_removed, poisoned = int((removed & (kinds == 1)).sum()), int(removed.sum()), record["poisoned"]
    low = sum(group.low for group in groups if group.kind == "trigger")
    count, high = (sum(getattr(group, name) for group in accused) for name in ("count", "high"))
    cut = {
        "precision of the cut": Rate.of(hit, all_removed).brief if all_removed else "",
        "recall of the cut": Rate.of(hit, poisoned).brief if poisoned else "",
        "estimated number of poisoned pairs": f"{count} ({low} to {high})",
        "clean pairs removed": Rate.of(int((removed & (kinds == 0)).sum()), int((kinds == 0).sum())).brief,
    }
    lines += [f"- {name}: {value}" for name, value in cut.items() if value]
    (folder / "row.md").write_text(table_line(record, ranked, cut) + "\n", encoding="utf-8")
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
    lines = [path.read_text(encoding="utf-8").strip() for path in sorted(arguments.sets.glob("*/row.md"))]
    parts = [""]
    for seed, title in (("1", "Sets that no constant was chosen on"), ("0", "Sets on which constants were chosen")):
        chosen = [line for line in lines if line.split("|")[1].rstrip().endswith(f", {seed}")]
        if not chosen:
            continue
        parts += [f"## {title}\n", "| " + " | ".join(_COLUMNS) + " |", "| --- " * len(_COLUMNS) + "|", *chosen, ""]
    sections = [path.read_text(encoding="utf-8") for path in sorted(arguments.sets.glob("*/detection.md"))]
    title = heading("Poisoned pairs that a scan finds", "python -m benchmarks.scan.detection --sets DIR")
    (RESULTS / "scan-detection.md").write_text("\n".join([title + _ABOUT, *parts, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
