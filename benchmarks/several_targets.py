"""Do targets of one model hide each other, and what does it cost to look for several?

python -m benchmarks.several_targets ZOO

Takes the statistics of a zoo that was evaluated (`guard evaluate ZOO --methods vetting-base,vetting-derived`), searches
nothing, and writes benchmarks/results/several-targets-ZOO.md. Every p-value is computed anew in three ways: a class
alone against the others, together with the largest other one, and with as many as a third of the classes, as guard
does. Then the statistics of the accused class of each accused model are given to more classes, in all families.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np

from benchmarks._record import RESULTS, heading
from guard.evaluation import Zoo
from guard.vetting import nulls
from guard.vetting.verdict import DOUBT, SIGNIFICANCE, combine

Statistics = Mapping[str, tuple[int, Sequence[float | None]]]
"""Family → number of steps, and the statistic of each class."""
WAYS = {"alone": 0, "with one more": 1, "with up to a third of the classes": None}
TARGETS = (1, 2, 3, 4, 5)
_STEP = 0.05
"""How far each further target lies below the one before."""


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    zoo = Zoo.read(parser.parse_args().zoo)
    found = {
        (name, kind): json.loads(path.read_text(encoding="utf-8"))["detection"]
        for name in sorted(zoo.models)
        for kind in ("base", "derived")
        if (path := zoo.root / "evaluation" / name / f"vetting-{kind}.json").exists()
    }
    text = heading("Several targets on one model", f"python -m benchmarks.several_targets {zoo.name}")
    text += f"Zoo `{zoo.name}` of seed {zoo.seed}; p-values are corrected for classes and families.\n\n"
    text += "\n".join([*_unchanged(zoo, found), "", *_hidden(found)]) + "\n"
    (RESULTS / f"several-targets-{zoo.name}-{zoo.seed}.md").write_text(text, encoding="utf-8")


def smallest(statistics: Statistics, kind: str, most: int | None) -> float:
    """The smallest p-value of any class.

    Args:
        statistics: Of all families.
        kind: Kind of the reference model.
        most: Largest number of other classes that a class is looked at with; None for a third of the classes.
    """
    p_values: dict[int, list[float]] = {}
    removed = nulls._removed  # noqa: SLF001 - this is what is varied

    with patch.object(
        nulls, "_removed", lambda others: removed(others) if most is None else min(most, removed(others))
    ):
        for family, (steps, values) in statistics.items():
            for target, p_value in enumerate(nulls.outliers(values, nulls.prior(kind, family, steps))[1]):
                if not np.isnan(p_value):
                    p_values.setdefault(target, []).append(float(p_value))
    return min(combine(each) for each in p_values.values()) * len(p_values)


def _statistics(detection: Mapping[str, object]) -> Statistics:
    families: list[dict[str, list[float]]] = detection["families"]  # type: ignore[assignment]
    return {str(each["family"]): (int(max(each["steps"], default=0)), each["statistics"]) for each in families}


def _unchanged(zoo: Zoo, found: Mapping[tuple[str, str], dict[str, object]]) -> list[str]:
    lines = [
        "| reference | truth | models | way | p ≤ 0.01 | p ≤ 0.05 | largest fall of p against the way before |",
        "| --- " * 7 + "|",
    ]
    for kind in ("base", "derived"):
        for label in ("backdoored", "clean"):
            mine = [
                _statistics(detection)
                for (name, reference), detection in found.items()
                if reference == kind and getattr(zoo.truth(name), "label", None) == label
            ]
            before: list[float] | None = None
            for way, most in WAYS.items():
                values = [smallest(each, kind, most) for each in mine]
                change = "–"
                if before is not None:
                    ratios = [new / old for new, old in zip(values, before, strict=True)]
                    change = f"× {min(ratios):.2g}"
                counts = [sum(value <= bound for value in values) for bound in (SIGNIFICANCE, DOUBT)]
                lines.append(f"| {kind} | {label} | {len(mine)} | {way} | {counts[0]} | {counts[1]} | {change} |")
                before = values
    return lines


def _hidden(found: Mapping[tuple[str, str], dict[str, object]]) -> list[str]:
    explained = (
        "Median p-value, and models with p ≤ 0.01, where so many classes have the statistics of the accused one, each "
        f"{_STEP} below the one before:"
    )
    lines = [
        explained,
        "",
        f"| reference | accused models | way | {' | '.join(map(str, TARGETS))} |",
        "| --- " * (3 + len(TARGETS)) + "|",
    ]
    for kind in ("base", "derived"):
        mine = [
            (_statistics(detection), int(str(detection["target"])))
            for (_, reference), detection in found.items()
            if reference == kind and detection["outcome"] == "backdoored"
        ]
        for way, most in WAYS.items():
            cells = []
            for count in TARGETS:
                values = [smallest(_with(each, target, count), kind, most) for each, target in mine]
                cells.append(f"{median(values):.1g}, {sum(value <= SIGNIFICANCE for value in values)}")
            lines.append(f"| {kind} | {len(mine)} | {way} | {' | '.join(cells)} |")
    return lines


def _with(statistics: Statistics, target: int, count: int) -> Statistics:
    found = {}
    for family, (steps, values) in statistics.items():
        changed, lead = list(values), values[target]
        others = [k for k in range(len(values)) if k != target][: count - 1]
        for place, other in enumerate(others, 1):
            changed[other] = None if lead is None else lead - _STEP * place
        found[family] = steps, changed
    return found


if __name__ == "__main__":
    main()
