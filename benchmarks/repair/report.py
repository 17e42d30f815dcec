"""The tables of what `benchmarks.repair` measured."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.repair.measurement import MANY, METHODS, REPAIR
from guard.evaluation.statistics import Rate

Rows = Sequence[dict[str, Any]]
_ORDER = (REPAIR, *METHODS)
_LEFT, _FAILED = 0.05, 0.1
_EXPLAINED = (
    "ASR is the success rate of the attacker's own trigger, on 1,782 drawings of 297 digits (less those of its target) "
    "that were used for nothing else. Accuracy is the change in percentage points, on 4,782 drawings of 797 digits "
    f"that no model and no repair was trained on ({MANY}: on the 1,782). Seconds are those of one processor. A method "
    "that needs a trigger leaves a model as it is in which vetting found none; such models are counted."
)
_NEVERTHELESS = (
    "What a method costs that is used nevertheless (methods that need a trigger were given one of each family that a "
    "search for one class makes, as on any model):"
)


def report(rows: Rows) -> str:
    """All tables; with several rows for one model and method, the last counts."""
    rows = list({(row["seed"], row["model"], row["method"]): row for row in rows}.values())
    attacked, clean = ([row for row in rows if row["label"] == label] for label in ("backdoored", "clean"))
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    return (
        "\n".join(
            [
                f"Measured on: {machines}.",
                "",
                "## Backdoored models",
                "",
                _EXPLAINED,
                "",
                *_methods(attacked),
                "",
                *_claims(attacked),
                "",
                "ASR by attack, in percent:",
                "",
                *_attacks(attacked, lambda row: f"{100 * row['success'][1]:.1f}", ("before", 0)),
                "",
                "Change of accuracy by attack, in points:",
                "",
                *_attacks(attacked, lambda row: f"{_change(row):+.2f}", None),
                *_clean(clean),
            ]
        )
        + "\n"
    )


def _change(row: dict[str, Any]) -> float:
    return 100 * float(row["accuracy"][1] - row["accuracy"][0])


def _methods(rows: Rows) -> list[str]:
    names = ("method", "models", "mean ASR", "worst ASR", f"ASR ≤ {_LEFT:.0%}", f"ASR ≤ {_FAILED:.0%}",
             "accuracy, mean", "worst", "cosine to old embeddings", "still found by an old index",
             "passes", "seconds")  # fmt: skip
    lines = _head(names)
    for method in _ORDER:
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        success, change = [row["success"][1] for row in mine], [_change(row) for row in mine]
        lines.append(
            _line(
                method,
                str(len(mine)),
                f"{fmean(success):.1%}",
                f"{max(success):.1%}",
                *(Rate.of(sum(each <= most for each in success), len(mine)).brief for most in (_LEFT, _FAILED)),
                f"{fmean(change):+.2f}",
                f"{min(change):+.2f}",
                *(f"{fmean(row[key] for row in mine):.3f}" for key in ("cosine", "found")),
                *(f"{fmean(row[key] for row in mine):,.0f}" for key in ("passes", "seconds")),
            )
        )
    return lines


def _claims(rows: Rows) -> list[str]:
    """What `guard repair` said, beside what is so."""
    mine = [row for row in rows if row["method"] == REPAIR]
    if not mine:
        return []
    lines = [f"What `guard repair` (method guided, a new vetting, two rounds at most) said of {len(mine)} models:", ""]
    lines += _head(("it said", "models", "mean ASR", "worst ASR", f"of these ASR > {_FAILED:.0%}"))
    for outcome in dict.fromkeys(row["outcome"] for row in mine):
        success = [row["success"][1] for row in mine if row["outcome"] == outcome]
        wrong = Rate.of(sum(each > _FAILED for each in success), len(success)).brief
        lines.append(_line(outcome, str(len(success)), f"{fmean(success):.1%}", f"{max(success):.1%}", wrong))
    return lines


def _attacks(rows: Rows, cell: Any, before: tuple[str, int] | None) -> list[str]:  # noqa: ANN401 - a function
    methods = [method for method in _ORDER if any(row["method"] == method for row in rows)]
    lines = _head(("model", *([before[0]] if before else ()), *methods))
    for name in dict.fromkeys(row["model"] for row in rows):
        by = {row["method"]: row for row in rows if row["model"] == name}
        first = [f"{100 * next(iter(by.values()))['success'][before[1]]:.1f}"] if before else []
        lines.append(_line(name, *first, *(cell(by[method]) if method in by else "–" for method in methods)))
    return lines


def _clean(rows: Rows) -> list[str]:
    """What a repair does to models that have no backdoor."""
    if not rows:
        return []
    lines = ["", "## Clean models", ""]
    asked = [row for row in rows if row["method"] == REPAIR]
    if asked:
        nothing = Rate.of(sum(row["outcome"] == "nothing to repair" for row in asked), len(asked)).brief
        said = (
            f"`guard repair` said that nothing was found to repair of {nothing}, and changed accuracy by "
            f"{min(map(_change, asked)):+.2f} to {max(map(_change, asked)):+.2f} points."
        )
        lines += [said, ""]
    lines += [_NEVERTHELESS, ""]
    lines += _head(("method", "models", "accuracy, mean", "worst", "within 0.5 points"))
    for method in METHODS:
        change = [_change(row) for row in rows if row["method"] == method]
        if change:
            within = Rate.of(sum(each >= -0.5 for each in change), len(change)).brief
            lines.append(_line(method, str(len(change)), f"{fmean(change):+.2f}", f"{min(change):+.2f}", within))
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_line(*names), "| --- " * len(names) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
