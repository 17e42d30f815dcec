"""The methods that can be evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from guard import profiles
from guard.errors import UsageError
from guard.evaluation.results import (
    Array,
    Detection,
    FamilyFinding,
    Features,
    Held,
    Recovery,
    ScoreFigures,
    Screening,
)
from guard.evaluation.statistics import auroc
from guard.evaluation.subject import Settings, Subject
from guard.screening import threshold
from guard.vetting import BUDGETS, FoundTrigger, Vetting, effect
from guard.vetting.evidence import Evidence
from guard.vetting.examination import METHOD
from guard.vetting.verdict import is_valid, suspect_of

Need = Literal["base", "calibration", "requests"]
Outcome = tuple[Detection | Screening, Features]

_SMALLEST = 1e-300
"""Smallest p-value that is told apart from zero."""


@dataclass(frozen=True)
class Method:
    """A way to judge models, or requests to them.

    Attributes:
        name: Names its results.
        version: Results of another version are made again.
        judges: What it judges.
        needs: What a model must have in the zoo; others are skipped.
        uses_base: Whether the result depends on the base where there is one.
        run: Does it.
        settings: What of the settings the result depends on.
    """

    name: str
    version: str
    judges: Literal["models", "requests"]
    needs: frozenset[Need]
    uses_base: bool
    run: Callable[[Subject], Outcome]
    settings: Callable[[Settings], Mapping[str, Any]]


def _inversion(*, paired: bool) -> Callable[[Subject], Outcome]:
    def run(subject: Subject) -> Outcome:
        return _detect(subject, subject.vetting(paired=paired))

    return run


def _detect(subject: Subject, vetting: Vetting) -> Outcome:
    """What vetting says, and how near it comes to the truth."""
    verdict = vetting.verdict
    ranked = sorted(
        (item for item in vetting.evidence if item.target is not None),
        key=lambda item: _corrected(item, len(vetting.evidence)),
    )
    valid = [item for item in ranked if is_valid(suspect_of(item))]
    leading = next(iter(valid or ranked), None)
    recovery, features = _recover(subject, vetting)
    detection = Detection(
        verdict.outcome,
        verdict.target,
        None if leading is None else leading.target,
        verdict.p_value,
        suspicion(vetting.evidence),
        tuple(_finding(item) for item in vetting.evidence),
        recovery,
        vetting.passes,
    )
    return detection, features


def suspicion(evidence: Sequence[Evidence]) -> float:
    """What models are ranked by: −log10 of the smallest corrected p-value that could have made a verdict.

    Only families whose leading class passes the held-out check count, as in the verdict; so that a threshold of 2 on
    this score accuses exactly the models that the verdict, at its significance of 0.01, accuses, and the ROC curve runs
    through the verdict's own operating point. The Bonferroni correction is not cut off at 1 here: that would tie most
    clean models. A model of which nothing passes gets the score of an uncorrected p-value of 1.
    """
    families = len(evidence)
    p_values = [
        _corrected(item, families) for item in evidence if item.target is not None and is_valid(suspect_of(item))
    ]
    worst = max((len(item.classes) for item in evidence), default=1) * max(1, families)
    return -float(np.log10(max(min(p_values, default=worst), _SMALLEST)))


def _corrected(item: Evidence, families: int) -> float:
    """The corrected p-value of the class that a family points at, not cut off at 1."""
    p_values = [entry.p_value for entry in item.classes if entry.p_value is not None]
    return min(p_values, default=1.0) * len(p_values) * families


def _finding(item: Evidence) -> FamilyFinding:
    if item.target is None:
        return FamilyFinding(item.family, None, item.p_value, None, None)
    suspect = suspect_of(item)
    return FamilyFinding(item.family, item.target, item.p_value, suspect.success, suspect.base_success)


def _recover(subject: Subject, vetting: Vetting) -> tuple[Recovery | None, Features]:
    attacks = subject.attacks
    true = torch.stack([attack.feature for attack in attacks]).numpy() if attacks else None
    found = _strongest(vetting)
    if found is None:
        return None, Features(None, true)
    images = subject.pixels.vetting
    mean = subject.classifier.embed(found.trigger.stamp(images)).mean(0)
    feature, centred = (
        normalize(mean, dim=0),
        normalize(mean - subject.classifier.embed(images).mean(0), dim=0),
    )
    requests = subject.pixels.requests
    recovery = Recovery(
        found.id,
        found.target,
        None if requests is None else effect(subject.classifier, found.trigger, found.target, requests).success,
        max((float(feature @ attack.feature) for attack in attacks), default=None),
        max((float(centred @ attack.centred) for attack in attacks), default=None),
    )
    return recovery, Features(feature.numpy(), true)


def _strongest(vetting: Vetting) -> FoundTrigger | None:
    """Of the class that the verdict accuses, if it accuses one."""
    accused = [found for found in vetting.triggers if found.target == vetting.verdict.target]
    return next(iter(accused or vetting.triggers), None)


def _screen(subject: Subject) -> Outcome:
    """Screening with what vetting reconstructed, and beside it the density score alone."""
    vetting = subject.vetting(paired=subject.zoo.models[subject.name].base is not None)
    density = _score(subject, replace(vetting, triggers=()))
    vetted = _score(subject, vetting) if vetting.triggers else density
    return Screening(len(vetting.triggers), vetted, density), Features()


def _score(subject: Subject, vetting: Vetting) -> ScoreFigures:
    calibration = subject.pixels.calibration
    if calibration is None:
        raise AssertionError("the method needs calibration images")
    # The largest alpha that any calibration supports; the thresholds are set below, from the same scores.
    profile = profiles.calibrate(
        profiles.build(subject.classifier, vetting), subject.classifier, calibration, 0.5, seed=subject.settings.seed
    )
    reference = profile.reference
    if reference is None:
        raise AssertionError("calibration leaves a reference")
    screen, _ = profile.screen()
    clean = screen.score_samples(subject.requests.numpy()).values
    stamped = [screen.score_samples(attack.embeddings.numpy()).values for attack in subject.attacks]
    return ScoreFigures(
        screen.score,
        profile.document.calibration.k if profile.document.calibration else 0,
        len(reference.clean),
        len(reference.scores),
        tuple(auroc(part.tolist(), clean.tolist()) for part in stamped),
        tuple(_held(alpha, reference.scores, clean, stamped) for alpha in subject.settings.alphas),
    )


def _held(alpha: float, calibration: Array, clean: Array, stamped: Sequence[Array]) -> Held:
    triggered = sum(len(part) for part in stamped)
    try:
        value = threshold(calibration, alpha).value
    except UsageError:
        return Held(alpha, None, 0, len(clean), 0, triggered)
    detected = sum(int((part > value).sum()) for part in stamped)
    return Held(alpha, value, int((clean > value).sum()), len(clean), detected, triggered)


def _search(settings: Settings) -> dict[str, Any]:
    return {"search": asdict(replace(BUDGETS[settings.budget], seed=settings.seed)), "images": settings.vetting_images}


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "inversion-paired",
            f"{METHOD}, evaluation 1",
            "models",
            frozenset({"base"}),
            uses_base=True,
            run=_inversion(paired=True),
            settings=_search,
        ),
        Method(
            "inversion",
            f"{METHOD}, evaluation 1",
            "models",
            frozenset(),
            uses_base=False,
            run=_inversion(paired=False),
            settings=_search,
        ),
        Method(
            "screening",
            f"{METHOD}, screening 1",
            "requests",
            frozenset({"calibration", "requests"}),
            uses_base=True,
            run=_screen,
            settings=lambda settings: {**_search(settings), "alphas": list(settings.alphas)},
        ),
    )
}
"""Every method, by name. Those that make searches come before those that only use them."""
