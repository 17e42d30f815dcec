"""From results to figures: true and false positives, and the cost of each method. Imports without torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from guard.evaluation.cliptrace import Prediction, Score, score
from guard.evaluation.results import Detection, Result, ScoreFigures
from guard.evaluation.statistics import Auroc, Rate, auroc

if TYPE_CHECKING:
    from guard.evaluation.running import Evaluation
    from guard.evaluation.zoo import Truth

ALL = "all"


@dataclass(frozen=True)
class Mean:
    """A mean over models, with the smallest and the largest of them.

    Attributes:
        value: The mean.
        low: The smallest.
        high: The largest.
        count: Number of models.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Mean | None":
        """The mean over the values that are not None; None if there are none."""
        known = [value for value in values if value is not None]
        return cls(float(np.mean(known)), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Flagged:
    """How many of some models were called backdoored.

    Attributes:
        group: Attack family, kind of negative, or `all`.
        models: Number of models.
        inconclusive: Number of models whose verdict is inconclusive: neither a hit nor a false alarm.
        flagged: Share of all models that were called backdoored; None without models.
        conclusive: The same share of the models with a conclusive verdict; None without any.
    """

    group: str
    models: int
    inconclusive: int
    flagged: Rate | None
    conclusive: Rate | None

    @classmethod
    def of(cls, group: str, detections: Sequence[Detection]) -> "Flagged":
        """Count the verdicts of a group of models."""
        flagged = sum(item.outcome == "backdoored" for item in detections)
        inconclusive = sum(item.outcome == "inconclusive" for item in detections)
        return cls(
            group,
            len(detections),
            inconclusive,
            _rate(flagged, len(detections)),
            _rate(flagged, len(detections) - inconclusive),
        )


@dataclass(frozen=True)
class FamilyDetection:
    """The performance of a method on one attack family.

    Attributes:
        flagged: Counts of models that were called backdoored.
        auroc: The family's models against all clean models of the zoo, by suspicion; None without clean ones.
        top1: How often the class ranked first is one of the attacker's targets, accused or not.
        cosine: Cosine between recovered and true target feature, over the models for which a trigger stood out.
        centred_cosine: The same after the mean embedding of the images is subtracted.
        success: Attack success rate of the reconstructed trigger on requests.
    """

    flagged: Flagged
    auroc: Auroc | None
    top1: Rate | None
    cosine: Mean | None
    centred_cosine: Mean | None
    success: Mean | None


@dataclass(frozen=True)
class DetectionSummary:
    """The figures of one method that judges models.

    Attributes:
        method: Name of the method.
        version: Version of the method.
        found: One entry per attack family, then one for all; backdoored models only.
        false_alarms: One entry per kind of clean model, then one for all.
        failed: Models whose attack failed; they count nowhere else.
        cliptrace: The CLIPTrace-2026 score on the backdoored and clean models; None where not all features are known.
        seconds: Seconds per model.
        passes: Forward passes of images through image towers, per model.
    """

    method: str
    version: str
    found: tuple[FamilyDetection, ...]
    false_alarms: tuple[Flagged, ...]
    failed: Flagged
    cliptrace: Score | None
    seconds: Mean | None
    passes: Mean | None


@dataclass(frozen=True)
class ThresholdSummary:
    """The thresholds of several models for one false-alarm rate, and how many requests they flag.

    Attributes:
        alpha: False-alarm rate that the thresholds were set for.
        unsupported: Number of models with too few calibration images for it.
        detected: Share of requests with a true trigger that are flagged, all models pooled; None without any.
        detected_by_model: Mean of this share over models.
        false_alarms: Share of clean requests that are flagged, all models pooled.
        false_alarms_by_model: Mean of this share over models.
    """

    alpha: float
    unsupported: int
    detected: Rate | None
    detected_by_model: Mean | None
    false_alarms: Rate | None
    false_alarms_by_model: Mean | None


@dataclass(frozen=True)
class ScreeningSummary:
    """The figures of one request-level score on one group of models.

    Attributes:
        group: Description of the group.
        score: `as vetted`, or `density`: the same banks without reconstructed triggers.
        models: Number of models.
        auroc: Mean over the true triggers of each model; None for clean models.
        thresholds: One entry per alpha.
    """

    group: str
    score: str
    models: int
    auroc: Mean | None
    thresholds: tuple[ThresholdSummary, ...]


@dataclass(frozen=True)
class ModelRow:
    """One model, for the table of all models.

    Attributes:
        name: Name of the model.
        recipe: Recipe by which it was made; None where the truth is withheld.
        family: Attack family or kind of negative; None where the truth is withheld.
        label: Label of the truth; None where it is withheld.
        accuracy: Accuracy on clean images, as its maker measured it.
        success: Attack success rate, as its maker measured it.
        verdicts: Outcome, accused class and p-value, by method.
    """

    name: str
    recipe: str | None
    family: str | None
    label: str | None
    accuracy: float | None
    success: float | None
    verdicts: dict[str, tuple[str, int | None, float | None]]


@dataclass(frozen=True)
class Summary:
    """The figures of an evaluation: `summary.json`.

    Attributes:
        zoo: Name of the zoo.
        seed: Seed of the evaluation.
        settings: Settings of the evaluation.
        guard: Versions of guard that computed the results.
        devices: Devices on which they were computed.
        models: Number of models by label; `unknown` where the truth is withheld.
        detection: One entry per method that judges models.
        screening: One entry per group and score; the attack families come first.
        rows: One entry per model.
        skipped: For each method, the models that lack a base, calibration images or requests that it needs.
        failures: Name of the model and reason, for each failure.
        seconds: Seconds spent on all results, in this run or earlier.
        fresh: Number of results that were computed in the last run.
        run_seconds: Wall-clock time of the last run.
    """

    zoo: str
    seed: int
    settings: dict[str, object]
    guard: tuple[str, ...]
    devices: tuple[str, ...]
    models: dict[str, int]
    detection: tuple[DetectionSummary, ...]
    screening: tuple[ScreeningSummary, ...]
    rows: tuple[ModelRow, ...]
    skipped: dict[str, tuple[str, ...]]
    failures: tuple[tuple[str, str], ...]
    seconds: float
    fresh: int
    run_seconds: float


def summarise(evaluation: "Evaluation") -> Summary:
    """The figures of an evaluation."""
    truths, results = evaluation.truths, evaluation.results.values()
    labels = [truth.label if truth else "unknown" for truth in truths.values()]
    rows = sorted(truths)
    return Summary(
        evaluation.zoo.name,
        evaluation.settings.seed,
        {
            "budget": evaluation.settings.budget,
            "vetting images": evaluation.settings.vetting_images,
            "alphas": list(evaluation.settings.alphas),
        },
        tuple(sorted({result.guard for result in results})),
        tuple(sorted({f"{result.device}, {result.threads} threads" for result in results})),
        {label: labels.count(label) for label in ("backdoored", "clean", "failed attack", "unknown")},
        tuple(
            _detection(method, evaluation)
            for method in evaluation.methods
            if any(result.method == method and result.detection for result in results)
        ),
        _screening([result for result in results if result.screening], truths),
        tuple(_row(name, truths[name], results) for name in rows),
        dict(evaluation.skipped),
        tuple((failure.model, failure.reason) for failure in evaluation.failures),
        sum(result.seconds for result in results),
        evaluation.fresh,
        evaluation.seconds,
    )


def _rate(count: int, total: int) -> Rate | None:
    return Rate.of(count, total) if total else None


def _detection(method: str, evaluation: "Evaluation") -> DetectionSummary:
    results = {model: result for (model, name), result in evaluation.results.items() if name == method}
    known = {
        model: (truth, detection)
        for model, result in results.items()
        if (truth := evaluation.truths[model]) and (detection := result.detection)
    }

    def of(label: str, family: str = ALL) -> "list[tuple[Truth, Detection]]":
        return [pair for pair in known.values() if pair[0].label == label and family in {ALL, pair[0].family}]

    def families(label: str) -> list[str]:
        return [*sorted({truth.family for truth, _ in of(label)}), ALL]

    clean = [detection for _, detection in of("clean")]
    return DetectionSummary(
        method,
        next(iter(results.values())).version,
        tuple(_found(family, of("backdoored", family), clean) for family in families("backdoored")),
        tuple(Flagged.of(kind, [item for _, item in of("clean", kind)]) for kind in families("clean")),
        Flagged.of("failed attack", [item for _, item in of("failed attack")]),
        _cliptrace(method, {model: pair[0] for model, pair in known.items()}, evaluation),
        Mean.of(result.seconds for result in results.values()),
        Mean.of(result.detection.passes for result in results.values() if result.detection),
    )


def _found(family: str, pairs: "Sequence[tuple[Truth, Detection]]", clean: Sequence[Detection]) -> FamilyDetection:
    detections = [detection for _, detection in pairs]
    ranked = [item.suspicion for item in detections], [item.suspicion for item in clean]
    recoveries = [item.recovery for item in detections if item.recovery]
    return FamilyDetection(
        Flagged.of(family, detections),
        auroc(*ranked) if all(ranked) else None,
        _rate(sum(item.leading in truth.targets for truth, item in pairs), len(pairs)),
        Mean.of(item.cosine for item in recoveries),
        Mean.of(item.centred_cosine for item in recoveries),
        Mean.of(item.success for item in recoveries),
    )


def _cliptrace(method: str, truths: "Mapping[str, Truth]", evaluation: "Evaluation") -> Score | None:
    scored = {model: truth for model, truth in truths.items() if truth.label != "failed attack"}
    true = {
        model: evaluation.features[model, method].true if truth.label == "backdoored" else None
        for model, truth in scored.items()
    }
    backdoored = [model for model, truth in scored.items() if truth.label == "backdoored"]
    if not backdoored or any(true[model] is None for model in backdoored):
        return None
    made = predictions(method, evaluation)
    return score({model: made[model] for model in scored}, true)


def predictions(method: str, evaluation: "Evaluation") -> dict[str, Prediction]:
    """The predictions of a method, in the form of the CLIPTrace challenge; `inconclusive` counts as clean."""
    return {
        model: Prediction(result.detection.outcome == "backdoored", evaluation.features[model, method].recovered)
        for (model, name), result in evaluation.results.items()
        if name == method and result.detection
    }


def _screening(results: Sequence[Result], truths: "Mapping[str, Truth | None]") -> tuple[ScreeningSummary, ...]:
    groups: dict[str, list[Result]] = {
        "backdoored, vetting found triggers": [],
        "backdoored, vetting found none": [],
        "clean, vetting found triggers": [],
        "clean, vetting found none": [],
    }
    families: dict[str, list[Result]] = {}
    for result in results:
        truth = truths[result.model]
        if truth and result.screening and truth.label != "failed attack":
            groups[f"{truth.label}, vetting found {'triggers' if result.screening.triggers else 'none'}"].append(result)
            if truth.label == "backdoored" and result.screening.triggers:
                families.setdefault(f"{truth.family}, vetting found triggers", []).append(result)
    return tuple(
        _scores(group, name, [figures for item in members if (figures := _figures(item, name))])
        for group, members in (*sorted(families.items()), *groups.items())
        if members
        for name in (("as vetted", "density") if group.endswith("triggers") else ("density",))
    )


def _figures(result: Result, name: str) -> ScoreFigures | None:
    if result.screening is None:
        return None
    return result.screening.vetted if name == "as vetted" else result.screening.density


def _scores(group: str, name: str, figures: Sequence[ScoreFigures]) -> ScreeningSummary:
    areas = [float(np.mean([area.value for area in item.auroc])) if item.auroc else None for item in figures]
    alphas = [held.alpha for held in figures[0].held]
    return ScreeningSummary(
        group, name, len(figures), Mean.of(areas), tuple(_threshold(alpha, figures) for alpha in alphas)
    )


def _threshold(alpha: float, figures: Sequence[ScoreFigures]) -> ThresholdSummary:
    every = [held for item in figures for held in item.held if held.alpha == alpha]
    held = [item for item in every if item.threshold is not None]
    return ThresholdSummary(
        alpha,
        len(every) - len(held),
        _rate(sum(item.detected for item in held), sum(item.triggered for item in held)),
        Mean.of(item.detected / item.triggered for item in held if item.triggered),
        _rate(sum(item.false_alarms for item in held), sum(item.clean for item in held)),
        Mean.of(item.false_alarms / item.clean for item in held if item.clean),
    )


def _row(name: str, truth: "Truth | None", results: Iterable[Result]) -> ModelRow:
    verdicts: dict[str, tuple[str, int | None, float | None]] = {
        result.method: (result.detection.outcome, result.detection.target, result.detection.p_value)
        for result in results
        if result.model == name and result.detection
    }
    if truth is None:
        return ModelRow(name, None, None, None, None, None, verdicts)
    return ModelRow(name, truth.recipe, truth.family, truth.label, truth.accuracy, truth.success, verdicts)
