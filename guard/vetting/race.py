"""The race over families and classes: search some of them for a while, then go on only where it can matter."""

import time
from collections.abc import Collection, Sequence
from math import isnan

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from guard.classifiers.classifier import Classifier
from guard.triggers import FAMILIES, Raw
from guard.vetting.budgets import InspectionSettings
from guard.vetting.inspection import DIVIDED, METHOD, RADII, Inspected, divided
from guard.vetting.nulls import outliers, prior
from guard.vetting.results import BEYOND, ClassStatistic, FamilyResult, ReferenceKind, leading
from guard.vetting.searches import Searches
from guard.vetting.verdict import class_results

RACED_CLASSES = 32
"""Number of classes up to which all are inspected. Of more, only candidates are, and null classes."""
_NULL_CLASSES = 12
"""Number of classes, drawn in advance, that candidates among more than `RACED_CLASSES` are compared with."""
_ALIKE = 0.5
"""Cosine of the text embeddings of two classes, less the mean of all, from which they resemble each other. What moves
images to a class moves them towards the classes that resemble it, which then say little about ordinary classes. Of ten
digits no two are as close (at most 0.3)."""
_KEPT = 0.1
"""Share of the inspected classes that go on besides the null classes."""
_TIE = 0.1
"""How far behind the last class that goes on another class still counts as level with it, in units of the statistic:
repeated searches differ by as much."""
_CLEAR = 1e-4
"""Corrected p-value at which half of the steps are enough. It is so small beside the significance that looking twice
costs no false alarm worth a correction."""
_HOPELESS = 0.2
"""p-value of a family, corrected for its classes only, above which the other half of its steps is saved, unless that of
the probes is smaller, or the family finds its triggers late (`DIVIDED`). Of a LoREx attack on the zoo `small` of seed
110 no family sees anything after half of the steps, and `large patch` does after all of them."""


class Race:
    """Inspection of all families and classes, first for half of the steps, then to the end where that is not enough.

    Args:
        searches: Runs the searches.
        reference_model: Kind of the model that the suspect is compared with.
        families: Names of trigger families.
        settings: How much work each inspection does.
        probed: The result of the probes.
        candidates: Classes that something hinted at; of more than `RACED_CLASSES`, no others are inspected but the null
            classes. Looking for them first costs no validity, since p-values are corrected for all classes.
        full: Whether to search every class of every family to the end.
    """

    def __init__(
        self,
        searches: Searches,
        reference_model: ReferenceKind,
        families: Sequence[str],
        settings: InspectionSettings,
        probed: FamilyResult,
        candidates: Collection[int],
        *,
        full: bool,
    ) -> None:
        self._searches, self._reference_model = searches, reference_model
        self._families, self._settings, self._full = families, settings, full
        self._names = searches.classifier.classes.names
        self._probed = probed
        every = distinct_classes(searches.classifier)
        self._classes = len(every)
        self._drops = not full and self._classes > RACED_CLASSES
        self._null_classes = null_classes(searches.classifier, settings.seed) if self._drops else set(every)
        self._inspected = [k for k in every if k in self._null_classes or k in candidates] if self._drops else every
        self._alike = {k: resembling(searches.classifier, k) for k in self._inspected} if self._drops else {}
        self._found: dict[str, dict[int, dict[int, Inspected]]] = {family: {} for family in families}
        """What was found, by family, number of steps and class."""
        self._seconds = dict.fromkeys(families, 0.0)

    def run(self) -> tuple[FamilyResult, ...]:
        """Search, and compare the classes with each other. The result of the probes is the last of the results."""
        active = {family: list(self._inspected) for family in self._families}
        results: tuple[FamilyResult, ...] = ()
        for parts in (1,) if self._full else (2, 1):  # all steps, or first half of them
            for family, classes in active.items():
                began = time.monotonic()
                settings = divided(self._settings, family)
                steps = max(1, settings.steps // parts)
                done = self._searches.inspect(family, settings, steps, classes)
                self._found[family].setdefault(steps, {}).update(done)
                self._seconds[family] += time.monotonic() - began
            results = (*(self._result(family) for family in self._families), self._probed)
            if _is_clear(results):
                break
            hinted = self._probed.p_value <= _HOPELESS
            active = {
                item.family: self._survivors(item)
                for item in results[:-1]
                if hinted or item.p_value <= _HOPELESS or item.family in DIVIDED
            }
        return results

    def parameters(self, family: str, target: int) -> Raw:
        """Return the unconstrained parameters with which the search for a class ended."""
        return self._latest(family)[target][1].raw

    def _latest(self, family: str) -> dict[int, tuple[int, Inspected]]:
        """Return the last result of each class, with the number of steps that led to it."""
        return {
            target: (steps, item)
            for steps, found in sorted(self._found[family].items())
            for target, item in found.items()
        }

    def _survivors(self, item: FamilyResult) -> list[int]:
        """Return the classes that go on: the null classes, the leading tenth, and those level with its last.

        Of few classes all are null classes.
        """
        ranked = sorted((entry.statistic for entry in item.classes), reverse=True)
        last = ranked[max(1, int(_KEPT * len(ranked))) - 1] - _TIE
        return [entry.target for entry in item.classes if entry.statistic >= last or entry.target in self._null_classes]

    def _result(self, family: str) -> FamilyResult:
        """Compare each class with the null classes after as many steps as it has had itself."""
        latest = self._latest(family)
        scores, p_values = np.full((2, len(self._names)), np.nan)
        for steps, found in self._found[family].items():
            values = [
                found[target].lead if target in found and not isnan(found[target].lead) else None
                for target in range(len(self._names))
            ]
            null = [target in self._null_classes for target in range(len(self._names))]
            judged = np.array([target in latest and latest[target][0] == steps for target in range(len(self._names))])
            fresh = outliers(values, prior(self._reference_model, family, steps), null, self._alike)
            scores, p_values = (np.where(judged, new, old) for new, old in zip(fresh, (scores, p_values), strict=True))
        classes = tuple(
            ClassStatistic(
                target,
                self._names[target],
                0.0 if isnan(item.lead) else item.lead,
                item.success,
                steps,
                None if np.isnan(scores[target]) else float(scores[target]),
                None if np.isnan(p_values[target]) else float(p_values[target]),
            )
            for target, (steps, item) in sorted(latest.items())
        )
        return self._summary(family, classes)

    def _summary(self, family: str, classes: tuple[ClassStatistic, ...]) -> FamilyResult:
        models = prior(self._reference_model, family, max(entry.steps for entry in classes)).models
        moderated = f", their spread moderated by {models} clean models" if models else ""
        return FamilyResult(
            METHOD,
            family,
            RADII[family],
            FAMILIES[family].norm_unit,
            f"lead of the class under its trigger{BEYOND[self._reference_model]}",
            f"Student-t prediction from the other classes{moderated}, one-sided, "
            f"Bonferroni over {self._classes} classes",
            self._reference_model,
            classes,
            *leading(classes, self._classes),
            self._settings.seed,
            sum(item.passes for _, item in self._latest(family).values()),
            self._seconds[family],
            self._classes,
        )


def distinct_classes(classifier: Classifier) -> list[int]:
    """The classes without those that repeat another one: these would be counted twice, also in the null."""
    distinct = classifier.distinct
    return [k for k in range(len(classifier.classes.names)) if distinct is None or bool(distinct[k])]


def null_classes(classifier: Classifier, seed: int) -> set[int]:
    """The classes that candidates among many are compared with.

    They are not drawn by the seed alone: whoever trains a model could then know them, and move them too.
    """
    every = distinct_classes(classifier)
    generator = torch.Generator().manual_seed(int(classifier.digest.root[:15], 16) ^ seed)
    return {every[k] for k in torch.randperm(len(every), generator=generator).tolist()[:_NULL_CLASSES]}


def resembling(classifier: Classifier, target: int) -> NDArray[np.bool_]:
    """Which classes resemble one, itself included, by what their prompts mean: bool, shape [C]."""
    meanings = classifier.meanings.float()
    centred = normalize(meanings - meanings.mean(0), dim=1)
    found: NDArray[np.bool_] = (centred @ centred[target] >= _ALIKE).cpu().numpy()
    return found


def _is_clear(results: Sequence[FamilyResult]) -> bool:
    """Whether some class stands out so clearly that the remaining steps would hardly change the verdict."""
    ranked = class_results(results)
    return bool(ranked) and ranked[0].p_value <= _CLEAR
