"""Train again on what a scan kept, and compare accuracy and attack success rate.

python -m benchmarks.scan.cleaning --data DIR --sets DIR --set NAME

Folders are those of `benchmarks.scan.training`; the set's keep.txt is that of `benchmarks.scan.detection`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.scan.training import SETS, images, planted, trained
from guard.attacks import LabelledImages, measure


def main() -> None:
    """Train, measure, and write `cleaned.json` beside the set's record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--set", dest="name", required=True)
    arguments = parser.parse_args()
    (each,) = (one for one in SETS if one.name == arguments.name)
    folder = arguments.sets / each.name
    stored = np.load(folder / "pairs.npz")
    lines = (folder / "keep.txt").read_text(encoding="utf-8").splitlines()
    kept = np.array(sorted(int(line) for line in lines))
    removed = np.setdiff1d(np.arange(len(stored["labels"])), kept)
    classes, _, test = images(each.data, arguments.data, each.classes)
    pairs = LabelledImages(torch.from_numpy(stored["pixels"][kept]), torch.from_numpy(stored["labels"][kept]))
    measured = measure(trained(each, pairs, classes), test, planted(each))
    record = {
        **asdict(each), "removed": len(removed), "removed poisoned": int((stored["kinds"][removed] == 1).sum()),
        "left": int((stored["kinds"][kept] == 1).sum()), "accuracy": measured.accuracy,
        "success": list(measured.success),
    }  # fmt: skip
    (folder / "cleaned.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
