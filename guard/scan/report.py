"""`report.html` of a scan: groups of suspicious pairs with their pictures, for a person to judge."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from guard._pages import templates
from guard._plots import BLUE, INK, plain, svg
from guard._types import Floats
from guard.report import pictures
from guard.scan.groups import Group
from guard.scan.results import ScanSummary

_SIDE = 72
_PATTERN_SIDE = 160
_SHOWN = 24
_MEANINGS = {
    "trigger": "different pictures with a common word in their captions and a pattern at one place",
    "suspected": "different pictures with a common word, set apart from all others with that word; no pattern shows",
    "copies": "one picture, many times: a placeholder, or a photograph that occurs often",
    "noise": "pictures without structure",
    "cluster": "pictures that lie close together, for no reason that would make them suspicious",
}


def render(
    summary: ScanSummary,
    images: Mapping[int, NDArray[np.uint8]],
    captions: Mapping[int, str],
    scores: NDArray[np.float64],
) -> str:
    """The text of the report.

    Args:
        summary: What was found.
        images: Images of the first pairs of each group, uint8, shape [3, H, W], as far as they could be read.
        captions: Captions of these pairs.
        scores: Scores of all pairs.
    """
    return (
        templates("scan")
        .get_template("report.html.j2")
        .render(
            summary=summary,
            groups=[_drawn(group, images, captions) for group in summary.groups],
            meanings=_MEANINGS,
            plot=_histogram(scores, summary.candidates),
            skipped=summary.skipped[:50],
        )
    )


def _drawn(group: Group, images: Mapping[int, NDArray[np.uint8]], captions: Mapping[int, str]) -> dict[str, Any]:
    return {
        "group": group,
        "pictures": [
            (pictures.png(images[row], _SIDE), captions.get(row, "")) for row in group.pairs[:_SHOWN] if row in images
        ],
        "captions": [captions[row] for row in group.pairs[:8] if row in captions],
        "pattern": pictures.png(_difference(group.pattern.mean), _PATTERN_SIDE) if group.pattern else None,
    }


def _difference(mean: Floats) -> NDArray[np.uint8]:
    """A difference of mean images around mid-grey, scaled to its largest value."""
    scale = 127 / max(float(np.abs(mean).max()), 1.0)
    drawn: NDArray[np.uint8] = (128 + scale * mean).round().astype(np.uint8)
    return drawn


def _histogram(scores: NDArray[np.float64], candidates: int) -> Markup:
    figure = Figure(figsize=(9.2, 2.4), layout="constrained")
    axis = figure.subplots()
    axis.hist(scores, 80, color=BLUE, alpha=0.7)
    cut = np.sort(scores)[-candidates]
    axis.axvline(float(cut), color=INK, linewidth=1.2, linestyle="--")
    axis.set_yscale("log")
    axis.set_xlabel("score of the coarse stage (larger is more suspicious); candidates are to the right of the line")
    axis.set_ylabel("pairs")
    plain(axis)
    text = svg(figure, "scores")
    return Markup(text[text.index("<svg") :])  # noqa: S704 - matplotlib escapes what it draws
