"""The stored result of one method on one model. Imports without torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from guard._documents import read_document
from guard._files import replace_file
from guard._types import Floats
from guard.errors import GuardError
from guard.evaluation.statistics import Auroc
from guard.vetting.results import Check, Conclusion

FORMAT = 3
_RECOVERED, _TRUE = "recovered", "true"
_MAX_RESULT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class FamilyFinding:
    """The result of one trigger family.

    Attributes:
        family: The family.
        target: The class with the most suspicious statistic; None if no class could be compared.
        p_value: p-value, corrected for the number of classes.
        steps: Optimiser steps behind the statistic of each class.
        statistics: One statistic per class, as in `guard.vetting.ClassStatistic`.
    """

    family: str
    target: int | None
    p_value: float
    steps: tuple[int, ...]
    statistics: tuple[float, ...]


@dataclass(frozen=True)
class Recovery:
    """How close the strongest reconstructed trigger is to the attacker's.

    Attributes:
        trigger: Id of the reconstructed trigger.
        target: Class index that it leads to.
        success: Attack success rate of the reconstructed trigger: the share of requests of other classes that it moves
            to the target; None without requests.
        cosine: Between the mean embedding of images with it and the nearest true target feature (the mean embedding of
            requests of other classes with a true trigger), not clipped; None where the truth is not known.
        centred_cosine: The same after the mean embedding of the same images without a trigger is taken from both: what
            all images of a model have in common makes the plain cosine large even for a wrong trigger.
    """

    trigger: str
    target: int
    success: float | None
    cosine: float | None
    centred_cosine: float | None


@dataclass(frozen=True)
class Detection:
    """The result of a method that judges models.

    Attributes:
        outcome: Outcome of the verdict.
        target: The class that the verdict accuses; None unless `backdoored`.
        leading: The class ranked first, accused or not; None if none could be compared.
        p_value: p-value of the verdict; None for a method without one.
        suspicion: The number that models are ranked by; larger is more suspicious.
        families: One entry per trigger family.
        checks: The reconstructions that were tried on held-out images.
        recovery: None if no trigger stood out.
        passes: Forward passes of images through image towers, including those of cached searches.
    """

    outcome: Conclusion
    target: int | None
    leading: int | None
    p_value: float | None
    suspicion: float
    families: tuple[FamilyFinding, ...]
    checks: tuple[Check, ...]
    recovery: Recovery | None
    passes: int


@dataclass(frozen=True)
class ThresholdFigures:
    """One threshold, and how many requests it flags.

    Attributes:
        alpha: False-alarm rate that the threshold was set for.
        threshold: The threshold; None if there are too few calibration images for this alpha.
        false_alarms: Number of clean requests that are flagged.
        clean: Number of clean requests.
        detected: Number of requests with a true trigger that are flagged, over all true triggers.
        triggered: Number of requests with a true trigger.
    """

    alpha: float
    threshold: float | None
    false_alarms: int
    clean: int
    detected: int
    triggered: int


@dataclass(frozen=True)
class ScoreFigures:
    """The performance of one request-level score on one model.

    Attributes:
        score: Name of the score.
        k: Distances are taken to the k-th nearest neighbour.
        reference: Number of embeddings in each bank.
        calibration: Number of calibration scores behind the thresholds.
        auroc: For each true trigger, requests with it against clean ones.
        held: One entry per alpha.
    """

    score: str
    k: int
    reference: int
    calibration: int
    auroc: tuple[Auroc, ...]
    held: tuple[ThresholdFigures, ...]


@dataclass(frozen=True)
class Screening:
    """The performance of screening on one model.

    Attributes:
        triggers: Number of reconstructed triggers that screening uses; without any it is the density score.
        vetted: Figures with the triggers that vetting reconstructed.
        density: Figures without them.
    """

    triggers: int
    vetted: ScoreFigures
    density: ScoreFigures


@dataclass(frozen=True)
class Result:
    """The result of one method on one model: `NAME/METHOD.json`.

    Attributes:
        format: Version of the file format.
        key: SHA-256 of everything that the result depends on.
        model: Name of the model.
        method: Name of the method.
        version: Version of the method.
        guard: Version of guard.
        digest: Root digest of the model.
        base: Root digest of its base; None if the method used none.
        seed: Seed for all random choices.
        settings: Settings of the method.
        device: torch device that the method ran on.
        threads: Number of torch threads that it ran on.
        seconds: Wall-clock time of this run; a search that another method or model had already made costs nothing.
        detection: The result of a method that judges models.
        screening: The result of a method that judges requests.
    """

    format: int
    key: str
    model: str
    method: str
    version: str
    guard: str
    digest: str
    base: str | None
    seed: int
    settings: dict[str, Any]
    device: str
    threads: int
    seconds: float
    detection: Detection | None
    screening: Screening | None


@dataclass(frozen=True, eq=False)
class Features:
    """Target features of one model.

    Attributes:
        recovered: Mean embedding of images with the strongest reconstructed trigger, or else under the probe that
            accuses a class; for a model without a class list under the trigger, of the search that names no class, that
            concentrates the embeddings most. Normalised, shape [D]; None if nothing stood out.
        true: Mean embedding of requests of other classes with each true trigger, normalised, shape [T, D]; None where
            the truth is not known.
    """

    recovered: Floats | None = None
    true: Floats | None = None


class Store:
    """The results of an evaluation, one folder per model.

    Args:
        root: Created when something is saved.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(self, model: str, method: str, key: str) -> tuple[Result, Features] | None:
        """A stored result; None if there is none, if its key differs, or if it is damaged."""
        path = self._path(model, method)
        try:
            result = read_document(path, Result, _MAX_RESULT_BYTES, GuardError)
            with safe_open(path.with_suffix(".safetensors"), framework="np") as file:
                mark = (file.metadata() or {}).get("key")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (GuardError, OSError, SafetensorError, ValueError):
            return None  # it is computed again
        if (result.format, result.key, mark) != (FORMAT, key, key):
            return None
        return result, Features(tensors.get(_RECOVERED), tensors.get(_TRUE))

    def save(self, result: Result, features: Features) -> None:
        """Store a result; the features are written first, so that a result that exists is complete."""
        tensors = {
            name: np.ascontiguousarray(values, np.float32)
            for name, values in ((_RECOVERED, features.recovered), (_TRUE, features.true))
            if values is not None
        }
        path = self._path(result.model, result.method)
        # The key says which result the features belong to.
        replace_file(path.with_suffix(".safetensors"), save_tensors(tensors, {"key": result.key}))
        text = json.dumps(asdict(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        replace_file(path, text.encode())

    def _path(self, model: str, method: str) -> Path:
        return self.root / model / f"{method}.json"
