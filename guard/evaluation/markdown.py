"""A summary as Markdown tables."""

from collections.abc import Sequence

from guard.evaluation.statistics import Auroc, Rate
from guard.evaluation.summary import DetectionSummary, FamilyDetection, Mean, ModelRow, ScreeningSummary, Summary

NOTHING = "–"
COST_NOTE = (
    "Where several methods or models share a search, its seconds count once, where it was made; its image passes count "
    "everywhere."
)
DETECTION_NOTE = (
    "AUROC against all clean models that this method judged, with Newcombe's 95 % interval; rates with exact "
    "(Clopper–Pearson) 95 % intervals. Cosine of recovered and true target feature, and success of the reconstructed "
    "trigger on requests: mean, smallest to largest, and the number of models for which a trigger stood out."
)
SCREENING_NOTE = (
    "AUROC: mean over models, smallest to largest. Requests of all models are pooled; the exact 95 % intervals take "
    "them as independent and leave out how models differ. “Not supported”: too few calibration images for this α."
)


def render(summary: Summary) -> str:
    """The whole summary as Markdown: tables with notes on how to read them."""
    models = summary.models
    settings = ", ".join(f"{name} {value}" for name, value in summary.settings.items())
    labels = ", ".join(f"{count} {label}" for label, count in models.items() if count)
    made = f"guard {', '.join(summary.guard) or NOTHING}; {'; '.join(summary.devices) or NOTHING}"
    cost = f"{_duration(summary.seconds)} of work on all results"
    run = f"the last run computed {summary.fresh} of them in {_duration(summary.run_seconds)}"
    lines = [f"# Evaluation of the zoo {summary.zoo}", ""]
    lines += [f"{sum(models.values())} models: {labels}. {settings}, seed {summary.seed}. {made}.", ""]
    lines += [f"Cost: {cost}; {run}. {COST_NOTE}", ""]
    for item in summary.detection:
        lines += _detection(item)
    if summary.screening:
        lines += _screening(summary.screening)
    lines += _models(summary)
    for method, names in summary.skipped.items():
        reason = "for lack of a base, calibration images or requests"
        lines += [f"Skipped by {method} {reason} ({len(names)}): {', '.join(names)}", ""]
    lines += [f"- FAILED {model}: {reason}" for model, reason in summary.failures]
    return "\n".join(lines).rstrip() + "\n"


def _detection(item: DetectionSummary) -> list[str]:
    found = [
        [
            entry.flagged.group,
            str(entry.flagged.models),
            _auroc(entry.auroc),
            _rate(entry.flagged.flagged),
            str(entry.flagged.inconclusive),
            _rate(entry.flagged.conclusive),
            _rate(entry.top1),
            *_recovery(entry),
        ]
        for entry in item.found
        if entry.flagged.models
    ]
    clean = [
        [
            entry.group,
            str(entry.models),
            _rate(entry.flagged),
            str(entry.inconclusive),
            _rate(entry.conclusive),
        ]
        for entry in item.false_alarms
        if entry.models
    ]
    lines = [f"## {item.method}", "", f"Version: {item.version}.", ""]
    if found:
        heads = ["attack", "n", "AUROC", "flagged", "inconclusive", "flagged of conclusive", "target ranked first"]
        lines += [
            *_table([*heads, "cosine", "centred cosine", "ASR of reconstruction"], found),
            DETECTION_NOTE,
            "",
        ]
    if clean:
        lines += _table(["clean models", "n", "flagged", "inconclusive", "flagged of conclusive"], clean)
    if item.failed.models:
        flagged = item.failed.flagged.count if item.failed.flagged else 0
        counts = f"{flagged} were flagged and {item.failed.inconclusive} were inconclusive"
        lines += [f"Of {item.failed.models} failed attacks, which count nowhere above, {counts}.", ""]
    if item.cliptrace:
        part = item.cliptrace
        parts = (
            f"{part.accuracy:.1%} of {part.models} models, cosine {part.cosine:.3f} over {part.backdoored} backdoored"
        )
        lines += [f"CLIPTrace-2026 score {part.value:.1f}: accuracy {parts} ones.", ""]
    if item.seconds and item.passes:
        lines += [f"Per model: {item.seconds.value:.0f} s, {item.passes.value:,.0f} image passes (means).", ""]
    return lines


def _recovery(entry: FamilyDetection) -> list[str]:
    return [_mean(value) for value in (entry.cosine, entry.centred_cosine, entry.success)]


def _screening(items: Sequence[ScreeningSummary]) -> list[str]:
    heads = ["models", "score", "n", "AUROC"]
    for threshold in items[0].thresholds:
        heads += [f"triggered flagged, α = {threshold.alpha:g}", f"clean flagged, α = {threshold.alpha:g}"]
    rows = []
    for item in items:
        row = [item.group, item.score, str(item.models), _mean(item.auroc, digits=3)]
        for threshold in item.thresholds:
            if threshold.unsupported == item.models:
                row += ["not supported"] * 2
            else:
                row += [_rate(threshold.detected), _rate(threshold.false_alarms)]
        rows.append(row)
    return [
        "## screening",
        "",
        *_table(heads, rows),
        SCREENING_NOTE,
        "",
    ]


def _models(summary: Summary) -> list[str]:
    methods = [item.method for item in summary.detection]
    heads = ["model", "recipe", "label", "accuracy", "ASR", *methods]
    rows = [
        [
            row.name,
            row.recipe or NOTHING,
            row.label or "unknown",
            NOTHING if row.accuracy is None else f"{row.accuracy:.3f}",
            NOTHING if row.success is None else f"{row.success:.3f}",
            *(_verdict(row, method) for method in methods),
        ]
        for row in summary.rows
    ]
    return ["## Models", "", *_table(heads, rows)]


def _verdict(row: ModelRow, method: str) -> str:
    if method not in row.verdicts:
        return NOTHING
    outcome, target, p_value = row.verdicts[method]
    likely = "" if p_value is None else f" (p = {p_value:.2g})"
    return f"{outcome}{'' if target is None else f', class {target}'}{likely}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _rate(value: Rate | None) -> str:
    return value.brief if value else NOTHING


def _auroc(value: Auroc | None) -> str:
    return value.brief if value else NOTHING


def _mean(value: Mean | None, *, digits: int = 2) -> str:
    if value is None:
        return NOTHING
    return f"{value.value:.{digits}f} ({value.low:.{digits}f}–{value.high:.{digits}f}; n = {value.count})"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
