"""A common style for all plots, and conversion of figures to SVG."""

import io

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e3e6ea"
BLUE, RED, GREY = "#2f6f9f", "#c8382e", "#9aa3ad"


def plain(axis: Axes) -> None:
    """Draw an axis without a frame, with grid and labels in grey."""
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(colors=MUTED, labelsize=8, length=0)
    axis.grid(axis="x", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=MUTED, fontsize=8.5)


def svg(figure: Figure, title: str) -> str:
    """A figure as an SVG document; equal figures give equal text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Title": title})
    return buffer.getvalue()
