"""Plots and images of a report, as text that HTML can hold."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from PIL import Image

from guard._plots import BLUE, GREY, GRID, INK, MUTED, RED, plain, svg
from guard.screening import Threshold
from guard.vetting.evidence import Evidence

Bytes = NDArray[np.uint8]

MODEL, SUSPECT, CLEAN, BASE = BLUE, RED, BLUE, GREY
MAX_CLASSES = 40
"""Classes drawn in one plot: the lowest scores; a thousand rows help nobody."""


def evidence_plot(evidence: Evidence, accused: int | None) -> Markup:
    """Two panels: the minimal norm of every class on model and base, and how far each lies from the others."""
    rows = sorted(evidence.classes, key=lambda item: (item.score is None, item.score))[:MAX_CLASSES]
    y = np.arange(len(rows))
    figure = Figure(figsize=(9.2, 1.0 + 0.27 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    colours = [SUSPECT if item.target == accused else MODEL for item in rows]
    for position, item in zip(y, rows, strict=True):
        if item.base_norm is not None:
            left.plot([item.base_norm, item.norm], [position] * 2, color=GRID, linewidth=3, zorder=1)
    if rows[0].base_norm is not None:
        left.scatter([item.base_norm or np.nan for item in rows], y, s=34, color=BASE, label="on the base", zorder=2)
    left.scatter([item.norm for item in rows], y, s=44, c=colours, label="on the model", zorder=3)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.set_xlabel(f"smallest working trigger, {evidence.norm_unit} (log scale)")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
    left.set_yticks(y, [item.name[:32] for item in rows])
    left.invert_yaxis()
    right.barh(y, [item.score or 0.0 for item in rows], color=colours, height=0.6)
    right.axvline(0, color=MUTED, linewidth=0.8)
    right.set_xlabel("distance from the other classes (t)")
    for axis in (left, right):
        _plain(axis)
    return _svg(figure, f"{evidence.family} evidence")


def score_plot(scores: Mapping[str, NDArray[np.floating]], threshold: Threshold, name: str) -> Markup:
    """Histograms of scores, one colour each, with the threshold."""
    values = np.concatenate(list(scores.values()))
    edges = np.linspace(float(values.min()), float(values.max()) + 1e-6, 60).tolist()
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    axis = figure.subplots()
    for (label, part), colour in zip(scores.items(), (CLEAN, SUSPECT, BASE), strict=False):
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
    axis.set_xlabel(f"{name} score (larger is more suspicious)")
    axis.set_ylabel("share of images")
    axis.legend(frameon=False, fontsize=8)
    _plain(axis)
    return _svg(figure, "score histogram")


def png(pixels: Bytes, *, scale: int) -> str:
    """A data URI of an image, shape [3, H, W] or [H, W], each pixel drawn `scale` times as large."""
    array = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    image = Image.fromarray(np.ascontiguousarray(array))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def strip(images: Sequence[Bytes], *, scale: int) -> list[str]:
    """Data URIs of several images."""
    return [png(image, scale=scale) for image in images]


def _plain(axis: Axes) -> None:
    plain(axis)
    for tick in axis.get_yticklabels():
        tick.set_color(INK)


def _svg(figure: Figure, title: str) -> Markup:
    """Inline SVG."""
    text = svg(figure, title)
    return Markup(text[text.index("<svg") :])  # noqa: S704 - matplotlib escapes the text that it draws
