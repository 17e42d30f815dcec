"""The files that an evaluation writes beside its results."""

import json
from dataclasses import asdict
from pathlib import Path

from guard._files import replace_file
from guard.evaluation.markdown import render
from guard.evaluation.running import Evaluation
from guard.evaluation.summary import Summary, summarise

SUMMARY_FILE, TABLES_FILE, PREDICTIONS_FILE = "summary.json", "summary.md", "predictions.json"


def write_summary(evaluation: Evaluation, out: Path) -> tuple[Summary, str]:
    """Write `summary.json`, `summary.md` and the plots.

    Returns:
        The summary, and its Markdown.
    """
    from guard.evaluation.plots import draw

    summary = summarise(evaluation)
    text = render(summary)
    for name, plot in draw(evaluation).items():
        replace_file(out / name, plot.encode())
    replace_file(out / SUMMARY_FILE, _json(asdict(summary)))
    replace_file(out / TABLES_FILE, text.encode())
    return summary, text


def write_predictions(evaluation: Evaluation, out: Path) -> list[dict[str, object]]:
    """Write `predictions.json`, for a zoo whose truth is withheld, so that no figures can be computed.

    Returns:
        One entry per model and method.
    """
    entries: list[dict[str, object]] = [
        {
            "model": model,
            "method": method,
            "outcome": result.detection.outcome,
            "target": result.detection.target,
            "p_value": result.detection.p_value,
            "suspicion": result.detection.suspicion,
            "digest": result.digest,
        }
        for (model, method), result in sorted(evaluation.results.items())
        if result.detection
    ]
    replace_file(out / PREDICTIONS_FILE, _json(entries))
    return entries


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
