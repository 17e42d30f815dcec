"""Examine a classifier for backdoors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.classifiers.digest import canonical, sha256
from guard.errors import ImageError, UsageError
from guard.triggers import FAMILIES, InvertibleTrigger
from guard.vetting.cache import SearchCache
from guard.vetting.evidence import ClassEvidence, Evidence, outliers
from guard.vetting.inversion import Reconstruction, SearchSettings, effect, reconstruct
from guard.vetting.verdict import DOUBT, SIGNIFICANCE, Verdict, is_valid, judge

METHOD = "minimal-norm inversion 2"
MIN_IMAGES = 64
CLASS_BATCH = 16
"""Classes searched side by side; bounds memory, and is the unit of work that an interrupted run does not repeat."""

Budget = Literal["quick", "standard", "thorough"]
BUDGETS: dict[Budget, SearchSettings] = {
    "quick": SearchSettings(steps=120, batch=32, stall=40),
    "standard": SearchSettings(steps=200, batch=48, stall=60),
    "thorough": SearchSettings(steps=500, batch=96, stall=120),
}


@dataclass(frozen=True)
class FoundTrigger:
    """A reconstructed trigger that stands out, strengthened for screening.

    Attributes:
        id: Names it in profile, metrics and replies: family and class index.
        target: Class index that it leads to.
        trigger: The transformation.
        norm: Its norm, in the family's unit; larger than the minimal norm that is the evidence.
        success: Success on held-out images, in [0, 1].
        p_value: Corrected for classes and families.
    """

    id: str
    target: int
    trigger: InvertibleTrigger
    norm: float
    success: float
    p_value: float


@dataclass(frozen=True)
class Vetting:
    """The result of examining one classifier.

    Attributes:
        verdict: What it comes to.
        evidence: One entry per family.
        triggers: The reconstructions that stand out and work on held-out images, strongest first.
        settings: How hard was searched.
        images: Number of images used to search, and kept out for the check.
        base: Root digest of the base model, if there was one.
        device: Where it ran.
        seconds: Wall-clock time.
        passes: Images pushed through image towers.
    """

    verdict: Verdict
    evidence: tuple[Evidence, ...]
    triggers: tuple[FoundTrigger, ...]
    settings: SearchSettings
    images: tuple[int, int]
    base: str | None
    device: str
    seconds: float
    passes: int


def vet(
    classifier: Classifier,
    images: Tensor,
    *,
    base: Classifier | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    budget: Budget = "standard",
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Vetting:
    """Reconstruct the smallest trigger of each family for each class, and judge whether one stands out.

    Half of the images are searched on, half are kept out for the check. With a base the statistic is paired, class by
    class: log(norm on the suspect / norm on the base), which removes what is easy about a class by nature.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W] at the classifier's resolution; unlabelled, at least 64.
        base: A trusted model with the same classes and input size, such as the checkpoint it was tuned from.
        families: Names from `guard.triggers.FAMILIES`.
        budget: How hard to search.
        seed: Of the split, the starts and the batches.
        cache: Folder in which finished searches are kept, so that an interrupted run goes on where it stopped and
            a base is searched once for many suspects.
        progress: Told (what, classes done, classes in all).

    Raises:
        ImageError: There are too few images.
        UsageError: The base is the suspect itself, or has other classes or another input size.
    """
    started = time.monotonic()
    if len(images) < MIN_IMAGES:
        raise ImageError(f"vetting needs at least {MIN_IMAGES} images, there are {len(images)}")
    if base is not None:
        _check_base(classifier, base)
    settings = replace(BUDGETS[budget], seed=seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    searched, held_out = images[order[: len(images) // 2]], images[order[len(images) // 2 :]]
    searches = _Searches(searched, held_out, SearchCache(cache) if cache else None, progress)
    everyone = torch.arange(len(classifier.classes.names))
    evidence, suspicious = [], []
    for family in families:
        began = time.monotonic()
        suspects = searches.run(classifier, family, everyone, settings, family)
        bases = searches.run(base, family, everyone, settings, f"{family}, base") if base else None
        transfer = [effect(base, item.trigger, item.target, held_out) for item in suspects] if base else []
        passes = sum(item.passes for item in [*suspects, *(bases or [])]) + sum(item.passes for item in transfer)
        entries = _classes(classifier.classes.names, suspects, bases, [item.success for item in transfer])
        evidence.append(_evidence(family, entries, len(families), seed, passes, time.monotonic() - began))
        for entry in entries:
            p_value = min(1.0, (1.0 if entry.p_value is None else entry.p_value) * len(entries) * len(families))
            if p_value <= DOUBT and is_valid(entry):
                suspicious.append((family, suspects[entry.target], p_value))
    verdict = judge(evidence)
    # Triggers that are merely doubtful would cost a sure verdict's screening some of its sharpness.
    limit = SIGNIFICANCE if verdict.outcome == "backdoored" else DOUBT
    found = [
        _strengthen(searches, classifier, family, weak, p_value, settings)
        for family, weak, p_value in suspicious
        if p_value <= limit
    ]
    return Vetting(
        verdict,
        tuple(evidence),
        tuple(sorted(found, key=lambda trigger: trigger.p_value)),
        settings,
        (len(searched), len(held_out)),
        base.digest.root if base else None,
        str(classifier.device),
        time.monotonic() - started,
        sum(item.passes for item in evidence),
    )


def _check_base(classifier: Classifier, base: Classifier) -> None:
    if base.digest.root == classifier.digest.root:
        raise UsageError("the base is the model itself; a model compared with itself shows nothing")
    if base.classes.names != classifier.classes.names:
        raise UsageError("the base has other classes than the model; give both the same list with --classes")
    if base.image_shape != classifier.image_shape:
        raise UsageError(f"the base takes images of {base.image_shape[1:]}, the model of {classifier.image_shape[1:]}")


class _Searches:
    """Runs searches in batches of classes, and remembers the finished ones."""

    def __init__(
        self, searched: Tensor, held_out: Tensor, cache: SearchCache | None, progress: Callable[[str, int, int], None]
    ) -> None:
        self._searched, self._held_out, self._cache, self._progress = searched, held_out, cache, progress
        self._images = sha256(canonical([sha256(part.contiguous().numpy().data) for part in (searched, held_out)]))

    def run(
        self, model: Classifier, family: str, targets: Tensor, settings: SearchSettings, what: str
    ) -> list[Reconstruction]:
        """Search one family for several classes."""
        key = sha256(canonical([METHOD, model.digest.root, family, asdict(settings), self._images]))[:32]
        results: list[Reconstruction] = []
        self._progress(what, 0, len(targets))
        for part in targets.split(CLASS_BATCH):
            name = f"{key}-{int(part[0])}-{len(part)}"
            done = self._cache.load(name, FAMILIES[family]) if self._cache else None
            if done is None:
                done = self._reconstruct(model, family, part, settings, what, len(results), len(targets))
                if self._cache:
                    self._cache.save(name, done)
            results += done
            self._progress(what, len(results), len(targets))
        return results

    def _reconstruct(
        self, model: Classifier, family: str, part: Tensor, settings: SearchSettings, what: str, before: int, count: int
    ) -> list[Reconstruction]:
        finished = before

        def step(classes: int) -> None:
            nonlocal finished
            finished += classes
            self._progress(what, finished, count)

        return reconstruct(model, FAMILIES[family], self._searched, self._held_out, part, settings, progress=step)


def _strengthen(
    searches: _Searches,
    classifier: Classifier,
    family: str,
    weak: Reconstruction,
    p_value: float,
    settings: SearchSettings,
) -> FoundTrigger:
    """Search once more for a trigger that wins as clearly as a genuine image of the class does.

    The smallest trigger is the right evidence and the wrong tool for screening: it barely crosses the boundary, where
    the attacker's own trigger goes to the middle of the class.
    """
    strong = replace(settings, success=0.99, margin=1.0, batch=max(64, settings.batch))
    result = searches.run(classifier, family, torch.tensor([weak.target]), strong, f"{family}, strengthened")[0]
    best = result if result.reached and result.success >= weak.success else weak
    return FoundTrigger(f"{family}-{best.target}", best.target, best.trigger, best.norm, best.success, p_value)


def _classes(
    names: Sequence[str],
    suspects: Sequence[Reconstruction],
    bases: Sequence[Reconstruction] | None,
    transfer: Sequence[float],
) -> tuple[ClassEvidence, ...]:
    """Statistics, scores and p-values of all classes."""
    statistics: list[float | None] = []
    for k, item in enumerate(suspects):
        usable = item.reached and item.norm > 0 and (bases is None or (bases[k].reached and bases[k].norm > 0))
        statistics.append(float(np.log(item.norm) - (np.log(bases[k].norm) if bases else 0.0)) if usable else None)
    scores, p_values = outliers(statistics)
    return tuple(
        ClassEvidence(
            item.target,
            names[item.target],
            item.reached,
            item.norm,
            item.success,
            item.margin,
            bases[k].norm if bases else None,
            transfer[k] if bases else None,
            statistics[k],
            None if np.isnan(scores[k]) else float(scores[k]),
            None if np.isnan(p_values[k]) else float(p_values[k]),
        )
        for k, item in enumerate(suspects)
    )


def _evidence(
    family: str, classes: tuple[ClassEvidence, ...], families: int, seed: int, passes: int, seconds: float
) -> Evidence:
    ranked = sorted((item for item in classes if item.p_value is not None), key=lambda item: item.p_value or 0.0)
    paired = classes[0].base_norm is not None
    return Evidence(
        METHOD,
        family,
        FAMILIES[family].norm_unit,
        "log(minimal norm on the model / minimal norm on the base)" if paired else "log(minimal norm)",
        f"Student-t prediction from the other {len(ranked) - 1} classes, one-sided, "
        f"Bonferroni over {len(ranked)} classes × {families} families",
        "base" if paired else "classes",
        classes,
        ranked[0].target if ranked else None,
        min(1.0, (ranked[0].p_value or 0.0) * len(ranked) * families) if ranked else 1.0,
        seed,
        passes,
        seconds,
    )
