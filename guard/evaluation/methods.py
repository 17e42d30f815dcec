"""The methods that `guard evaluate` can run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from guard._types import Floats
from guard.baselines import DecreeSettings, clip_inspector, collapse
from guard.errors import UsageError
from guard.evaluation.results import (
    Detection,
    FamilyFinding,
    Features,
    Recovery,
    ScoreFigures,
    Screening,
    ThresholdFigures,
)
from guard.evaluation.statistics import auroc
from guard.evaluation.subject import EvaluationSettings, Subject
from guard.profiles import Profile
from guard.screening import DENSITY, threshold
from guard.vetting import BUDGETS, Conclusion, FamilyResult, ReconstructedTrigger, Vetting, effect
from guard.vetting.batches import halves
from guard.vetting.inspection import METHOD
from guard.vetting.nulls import table_digest
from guard.vetting.probes import METHOD as PROBE_METHOD
from guard.vetting.probes import Probe, listed_probes
from guard.vetting.reference import METHOD as REFERENCE_METHOD
from guard.vetting.verdict import SIGNIFICANCE, is_valid, suspicion

_VETTING = f"{METHOD}, {PROBE_METHOD}, {REFERENCE_METHOD}, nulls {table_digest()}"
Need = Literal["base", "calibration", "requests"]
MethodOutput = tuple[Detection | Screening, Features]

_PUBLISHED_PL1 = 0.1
"""Published threshold of DECREE: a smaller share of the image counts as a backdoor."""
_CONCENTRATED = 0.15
"""Concentration from which what a search that names no class found is a target. Of nine models of the zoo `small` of
seed 50, with their bases, five backdoored ones have 0.30 to 0.91 and the right target, two have 0.02 and 0.04 and a
wrong one; two clean ones have −0.03 and 0.01."""
_SMALLEST = 1e-300
"""Smaller p-values are counted as this one, so that their logarithm is finite."""


@dataclass(frozen=True)
class Method:
    """A way to judge models, or requests to models.

    Attributes:
        name: Name of the method, under which its results are stored.
        version: Version of the method; stored results of another version are computed again.
        judges: Whether it judges models or requests.
        needs: What a model must have in the zoo; models that lack it are skipped.
        uses_base: Whether the result depends on the base model where there is one.
        run: Function that runs the method.
        settings: Function that returns the settings on which the result depends.
    """

    name: str
    version: str
    judges: Literal["models", "requests"]
    needs: frozenset[Need]
    uses_base: bool
    run: Callable[[Subject], MethodOutput]
    settings: Callable[[EvaluationSettings], Mapping[str, Any]]


def _vetting(*, paired: bool) -> Callable[[Subject], MethodOutput]:
    def run(subject: Subject) -> MethodOutput:
        return _detect(subject, subject.vetting(paired=paired))

    return run


def _detect(subject: Subject, vetting: Vetting) -> MethodOutput:
    """Return what vetting says, and how similar its trigger is to the attacker's."""
    verdict = vetting.verdict
    leading, p_value = suspicion(vetting.results, vetting.checks)
    if verdict.outcome != "backdoored":
        # What one seed of several accuses is inconclusive, and ranks below every model that is accused.
        p_value = max(p_value, math.nextafter(SIGNIFICANCE, 1))
    recovery, features = _recover(subject, vetting)
    detection = Detection(
        verdict.outcome,
        verdict.target,
        leading,
        verdict.p_value,
        -float(np.log10(max(p_value, _SMALLEST))),
        tuple(_finding(item) for item in vetting.results),
        vetting.checks,
        recovery,
        vetting.passes,
    )
    return detection, features


def _finding(item: FamilyResult) -> FamilyFinding:
    return FamilyFinding(
        item.family,
        item.target,
        item.p_value,
        tuple(entry.steps for entry in item.classes),
        tuple(entry.statistic for entry in item.classes),
    )


def _recover(subject: Subject, vetting: Vetting) -> tuple[Recovery | None, Features]:
    attacks = subject.attacks
    true = torch.stack([attack.feature for attack in attacks]).numpy() if attacks else None
    # The targets of a model without classes need not be near any of the classes that it was vetted with.
    unnamed = [each for each in vetting.unnamed if not subject.has_classes and each.concentration >= _CONCENTRATED]
    target_feature = max(unnamed, key=lambda each: each.concentration).feature.numpy() if unnamed else None
    images = subject.pixels.vetting
    found = _strongest(vetting)
    if found is None:
        probe = _proven(vetting)
        if target_feature is None and probe is not None:
            target_feature = normalize(subject.classifier.embed(probe.stamp(images)).mean(0), dim=0).numpy()
        return None, Features(target_feature, true)
    mean = subject.classifier.embed(found.trigger.stamp(images)).mean(0)
    feature, centred = (
        normalize(mean, dim=0),
        normalize(mean - subject.classifier.embed(images).mean(0), dim=0),
    )
    requests = subject.pixels.requests
    recovery = Recovery(
        found.id,
        found.target,
        None if requests is None else effect(subject.classifier, found.trigger.stamp, found.target, requests).success,
        max((float(feature @ attack.feature) for attack in attacks), default=None),
        max((float(centred @ attack.centred) for attack in attacks), default=None),
    )
    return recovery, Features(feature.numpy() if target_feature is None else target_feature, true)


def _strongest(vetting: Vetting) -> ReconstructedTrigger | None:
    """Return the trigger with the strongest evidence, for the accused class if there is one."""
    accused = [found for found in vetting.triggers if found.target == vetting.verdict.target]
    return next(iter(accused or vetting.triggers), None)


def _proven(vetting: Vetting) -> Probe | None:
    """Return the probe that accuses the class of the verdict, where no trigger does; None if there is none."""
    target = vetting.verdict.target
    names = {check.probe for check in vetting.checks if check.target == target and is_valid(check)}
    return next((probe for probe in listed_probes() if probe.name in names), None)


def _clip_inspector(subject: Subject) -> MethodOutput:
    """Run CLIP-Inspector as published, with its own threshold."""
    found = clip_inspector(subject.classifier, subject.pixels.vetting, seed=subject.settings.seed)
    anomaly = 0.0 if found.target is None else found.anomaly[found.target]
    outcome: Conclusion = "backdoored" if found.backdoored else "no evidence"
    target = found.target if found.backdoored else None
    return Detection(outcome, target, found.target, None, anomaly, (), (), None, found.passes), Features()


def _decree(subject: Subject) -> MethodOutput:
    """Run DECREE with its published threshold; models are ranked by the ratio to the base model where there is one."""
    searched, held_out = halves(subject.pixels.vetting, subject.settings.seed)
    settings = DecreeSettings(seed=subject.settings.seed)
    found = collapse(subject.classifier, searched, held_out, settings)
    rank, passes = -float(np.log(found.pl1)), found.passes
    if subject.base is not None:
        compared = collapse(subject.base, searched, held_out, settings)
        rank, passes = rank + float(np.log(compared.pl1)), passes + compared.passes
    true = torch.stack([attack.feature for attack in subject.attacks]).numpy() if subject.attacks else None
    outcome: Conclusion = "backdoored" if found.reached and found.pl1 < _PUBLISHED_PL1 else "no evidence"
    detection = Detection(outcome, None, None, None, rank, (), (), None, passes)
    return detection, Features(found.feature.numpy(), true)


def _screen(subject: Subject) -> MethodOutput:
    """Run screening with the triggers that vetting reconstructed, and with the density score alone."""
    vetting = subject.vetting(paired=subject.zoo.models[subject.name].base is not None)
    density = _score(subject, replace(vetting, triggers=()))
    vetted = _score(subject, vetting) if vetting.triggers else density
    return Screening(len(vetting.triggers), vetted, density), Features()


def _score(subject: Subject, vetting: Vetting) -> ScoreFigures:
    calibration = subject.pixels.calibration
    if calibration is None:
        raise AssertionError("the method needs calibration images")
    # An alpha that every calibration supports; the thresholds are set below, from the same scores.
    profile = Profile.build(subject.classifier, vetting).calibrate(
        subject.classifier, calibration, 0.5, seed=subject.settings.seed
    )
    reference = profile.reference
    if reference is None:
        raise AssertionError("a calibrated profile has a reference")
    screen = profile.detector().screen
    clean = screen.score_samples(subject.requests.numpy()).values
    stamped = [screen.score_samples(attack.embeddings.numpy()).values for attack in subject.attacks]
    return ScoreFigures(
        "match and density" if screen.triggers else DENSITY,
        profile.document.calibration.k if profile.document.calibration else 0,
        len(reference.banks.reference),
        len(reference.clean.values),
        tuple(auroc(part.tolist(), clean.tolist()) for part in stamped),
        tuple(_at_alpha(alpha, reference.clean.values, clean, stamped) for alpha in subject.settings.alphas),
    )


def _at_alpha(alpha: float, calibration: Floats, clean: Floats, stamped: Sequence[Floats]) -> ThresholdFigures:
    triggered = sum(len(part) for part in stamped)
    try:
        value = threshold(calibration, alpha).value
    except UsageError:
        return ThresholdFigures(alpha, None, 0, len(clean), 0, triggered)
    detected = sum(int((part > value).sum()) for part in stamped)
    return ThresholdFigures(alpha, value, int((clean > value).sum()), len(clean), detected, triggered)


def _effort(settings: EvaluationSettings) -> dict[str, Any]:
    return {"effort": asdict(BUDGETS[settings.budget].seeded(settings.seed)), "images": settings.vetting_images}


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "vetting-base",
            f"{_VETTING}, evaluation 13",
            "models",
            frozenset({"base"}),
            uses_base=True,
            run=_vetting(paired=True),
            settings=_effort,
        ),
        Method(
            "vetting-derived",
            f"{_VETTING}, evaluation 13",
            "models",
            frozenset(),
            uses_base=False,
            run=_vetting(paired=False),
            settings=_effort,
        ),
        Method(
            "clip-inspector",
            "as published, evaluation 1",
            "models",
            frozenset(),
            uses_base=False,
            run=_clip_inspector,
            settings=lambda settings: {"seed": settings.seed, "images": settings.vetting_images},
        ),
        Method(
            "decree",
            "published threshold, evaluation 2",
            "models",
            frozenset(),
            uses_base=True,
            run=_decree,
            settings=lambda settings: {"seed": settings.seed, "images": settings.vetting_images},
        ),
        Method(
            "screening",
            f"{_VETTING}, screening 6",
            "requests",
            frozenset({"calibration", "requests"}),
            uses_base=True,
            run=_screen,
            settings=lambda settings: {**_effort(settings), "alphas": list(settings.alphas)},
        ),
    )
}
"""All methods by name. Methods that run searches come before methods that only use their results."""
