"""Plots and images of a report, as text that can be embedded in HTML."""

import base64
import io
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from guard._plots import BLUE, GREY, GRID, INK, MUTED, RED, plain, svg
from guard.screening import Threshold
from guard.vetting.results import ClassStatistic, FamilyResult
from guard.vetting.text_results import PromptAssimilation

Bytes = NDArray[np.uint8]
AMBER = "#a86400"

_BAND = 2.0
"""Half-width of the shaded band, in prediction errors: about 19 of 20 ordinary classes lie within it."""
_MAX_DOTS = 200
"""Largest number of classes of one family that are drawn as vectors. More are drawn as an image, whose size does not
grow with their number."""


def evidence_plot(results: Sequence[FamilyResult], accused: int | None, suspicious: Collection[int]) -> Markup:
    """Plot the lead of each class, and its distance from the other classes: one row per family, one dot per class.

    Classes are distinguished by colour alone. Their names may contain characters that no font has, and are listed
    beside the plot.

    Args:
        results: One entry per family, at least one.
        accused: Index of the class that the verdict accuses; None for none.
        suspicious: Indices of other classes to colour.
    """
    figure = Figure(figsize=(9.2, 0.9 + 0.4 * len(results)), layout="constrained", dpi=200)
    lead, distance = figure.subplots(1, 2, sharey=True, width_ratios=[4, 5])
    distance.axvspan(-_BAND, _BAND, color=GRID, alpha=0.55, linewidth=0, zorder=0)
    distance.axvline(0, color=GREY, linewidth=1)
    lead.axvline(0, color=GREY, linewidth=1, linestyle="--")
    for row, item in enumerate(results):
        # The coloured dots are drawn last, on top of the others.
        for wanted, colour, size in ((False, GREY, 26), (True, AMBER, 46), (None, RED, 46)):
            chosen = [entry for entry in item.classes if _kind(entry, accused, suspicious) is wanted]
            style = {"color": colour, "s": size, "linewidths": 0, "alpha": 0.6 if colour == GREY else 1.0, "zorder": 3}
            raster = len(item.classes) > _MAX_DOTS
            lead.scatter([entry.statistic for entry in chosen], [row] * len(chosen), rasterized=raster, **style)
            scored = [entry.score for entry in chosen if entry.score is not None]
            distance.scatter(scored, [row] * len(scored), rasterized=raster, **style)
        if item.target is None:
            distance.text(_BAND + 0.3, row, "too few classes to compare", color=MUTED, fontsize=8, va="center")
    lead.set_yticks(range(len(results)), [item.family[:24] for item in results], parse_math=False)
    lead.set_ylim(len(results) - 0.5, -0.5)
    lead.set_xlabel("lead of the class under its trigger")
    distance.set_xlabel("distance from the other classes, in prediction errors (t)")
    for axis in (lead, distance):
        _plain(axis)
    return _svg(figure, "evidence")


def _kind(entry: ClassStatistic, accused: int | None, suspicious: Collection[int]) -> bool | None:
    """Return None for the accused class, otherwise whether the class is suspicious."""
    return None if entry.target == accused else entry.target in suspicious


def score_plot(scores: Mapping[str, NDArray[np.floating]], threshold: Threshold) -> Markup:
    """Plot histograms of scores, in one colour each, with the threshold."""
    values = np.concatenate(list(scores.values()))
    edges = np.linspace(float(values.min()), float(values.max()) + 1e-6, 60).tolist()
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    axis = figure.subplots()
    for (label, part), colour in zip(scores.items(), (BLUE, RED, GREY), strict=False):
        axis.hist(part, edges, weights=np.full(len(part), 1 / len(part)), alpha=0.65, color=colour, label=label)
    axis.axvline(threshold.value, color=INK, linewidth=1.2, linestyle="--")
    axis.annotate(
        f"threshold, α = {threshold.alpha:g}",
        (threshold.value, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -10),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )
    axis.set_xlabel("score (larger is more suspicious)")
    axis.set_ylabel("share of images")
    axis.legend(frameon=False, fontsize=8)
    _plain(axis)
    return _svg(figure, "score histogram")


def assimilation_plot(found: PromptAssimilation) -> Markup:
    """Plot for each held-out prompt how alike the features of its tokens are, without and with the trigger.

    Args:
        found: One number for each prompt.
    """
    figure = Figure(figsize=(9.2, 2.6), layout="constrained", dpi=200)
    axis = figure.subplots()
    order = np.argsort(found.plain)
    for label, values, colour in (
        ("without the trigger", found.plain, GREY),
        ("with it, on the reference model", found.reference, BLUE),
        ("with it", found.triggered, RED),
    ):
        axis.scatter(
            range(len(order)), np.asarray(values)[order], color=colour, s=18, linewidths=0, label=label, zorder=3
        )
    axis.set_xlabel("held-out prompts, in the order of their assimilation without the trigger")
    axis.set_ylabel("assimilation")
    axis.legend(frameon=False, fontsize=8)
    _plain(axis)
    return _svg(figure, "assimilation of each prompt")


def png(pixels: Bytes, side: int) -> str:
    """Return a data URI of an image, shape [3, H, W] or [H, W], enlarged or averaged to about this side."""
    array = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    image = Image.fromarray(np.ascontiguousarray(array))
    scale = side // image.width
    if scale >= 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    else:
        image = image.resize((side, side), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain(axis: Axes) -> None:
    plain(axis)
    for tick in axis.get_yticklabels():
        tick.set_color(INK)


def _svg(figure: Figure, title: str) -> Markup:
    """Return a figure as inline SVG."""
    text = svg(figure, title)
    return Markup(text[text.index("<svg") :])  # noqa: S704 - matplotlib escapes the text that it draws
