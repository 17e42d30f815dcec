"""Plots of an evaluation, as SVG."""

import numpy as np
from matplotlib.figure import Figure

from guard._plots import BLUE, GREY, GRID, INK, RED, plain, svg
from guard.evaluation.running import Evaluation

COLOURS = (BLUE, RED, "#3f8f5f", "#b7791f", "#6b4fa0", GREY)
CLEAN, BACKDOORED, FAILED = BLUE, RED, GREY
VERDICT = 2.0
"""The suspicion at which a verdict accuses: a corrected p-value of 0.01."""
TICKS = (-2, 0, 2, 4, 10, 30, 100, 300)


def draw(evaluation: Evaluation) -> dict[str, str]:
    """File name → SVG: one plot with the ROC curves of all methods, and for each method its models by suspicion.

    Only methods that judged both clean and backdoored models are drawn.
    """
    methods = [method for method in evaluation.methods if all(_suspicions(evaluation, method))]
    plots = {f"suspicion-{method}.svg": _strips(evaluation, method) for method in methods}
    return {"roc.svg": _roc(evaluation, methods), **plots} if methods else {}


def _suspicions(evaluation: Evaluation, method: str) -> tuple[list[float], list[float]]:
    """Suspicions of the backdoored and of the clean models."""
    groups: dict[str, list[float]] = {"backdoored": [], "clean": [], "failed attack": []}
    for (model, name), result in evaluation.results.items():
        truth = evaluation.truths[model]
        if name == method and truth and result.detection:
            groups[truth.label].append(result.detection.suspicion)
    return groups["backdoored"], groups["clean"]


def _roc(evaluation: Evaluation, methods: list[str]) -> str:
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=GRID, linewidth=1)
    for method, colour in zip(methods, COLOURS * len(methods), strict=False):
        positive, negative = (np.array(part) for part in _suspicions(evaluation, method))
        limits = np.unique(np.concatenate([positive, negative]))[::-1]
        x = [0.0, *((negative >= limit).mean() for limit in limits)]
        y = [0.0, *((positive >= limit).mean() for limit in limits)]
        axis.plot(x, y, color=colour, label=f"{method} ({len(positive)} backdoored, {len(negative)} clean)")
    axis.set_xlabel("clean models accused")
    axis.set_ylabel("backdoored models found")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    plain(axis)
    return svg(figure, "ROC")


def _strips(evaluation: Evaluation, method: str) -> str:
    """One row per family of attacks and kind of clean model."""
    rows: dict[tuple[int, str], list[float]] = {}
    order = {"clean": 0, "failed attack": 1, "backdoored": 2}
    for (model, name), result in sorted(evaluation.results.items()):
        truth = evaluation.truths[model]
        if name == method and truth and result.detection:
            key = order[truth.label], f"{truth.label}: {truth.family}"
            rows.setdefault(key, []).append(result.detection.suspicion)
    figure = Figure(figsize=(8.4, 1.0 + 0.34 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for position, key in enumerate(sorted(rows)):
        values = rows[key]
        colour = (CLEAN, FAILED, BACKDOORED)[key[0]]
        # Spread evenly rather than at random, so that equal results give equal plots.
        heights = position + np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [position]
        axis.scatter(values, heights, s=18, color=colour, alpha=0.75, linewidths=0)
    axis.axvline(VERDICT, color=INK, linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), [f"{label} ({len(rows[rank, label])})" for rank, label in sorted(rows)])
    largest = max(VERDICT, *(value for values in rows.values() for value in values))
    axis.set_xscale("symlog", linthresh=4)
    axis.set_xticks([tick for tick in TICKS if tick <= largest], [str(tick) for tick in TICKS if tick <= largest])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("suspicion: −log10 of the corrected p-value (dashed: where a verdict accuses)")
    plain(axis)
    return svg(figure, method)
