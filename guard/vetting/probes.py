"""Probes: fixed changes of images, and which classes gain from them on the suspect and not on its reference model.

Gradients find badly what few numbers describe and what is periodic or has no gradient: a sinusoid, JPEG compression,
few colours. A list finds it with forward passes alone, at a cost that does not depend on the number of classes. The
list is `probes.toml`; whoever adds a line there adds a probe.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError, validate_call
from torch import Tensor

from guard._documents import first_error, read_toml, validated
from guard.classifiers.classifier import Classifier
from guard.errors import UsageError
from guard.triggers.base import stamped
from guard.vetting.fixed_changes import KINDS, Change
from guard.vetting.lead import looks_at, of_distinct_classes
from guard.vetting.nulls import largest, outliers, prior
from guard.vetting.results import BEYOND, PROBES, ClassStatistic, FamilyResult, ReferenceKind, leading

METHOD = "probes 2"
"""Name and version of the method; it changes when results are no longer comparable."""
SCREENED, EXAMINED = 24, 96
"""Images that every probe is tried on, and images that the best probes are tried on."""
_KEPT = 12
"""Number of probes that are tried on more images: those with the largest gains of any class."""
_LEAST_MARGIN = 3.0
"""Least median difference of the two largest scores of an image. Trained models mostly have more: of 94 models of
digits and of CIFAR-10 all but four, and the median has 6.7. A sinusoid is found at this one (p = 0.0007), and at 1 it
is not."""
_TINY = 1e-12
_FLOOR = 0.02
_FEW = 32
_LARGEST_LIST = 64 * 1024


@dataclass(frozen=True)
class Probe:
    """A fixed change of images.

    Attributes:
        name: Kind and parameters, for people.
        change: From images, float, shape [N, 3, H, W], values in [0, 1], to changed images of the same shape and range.
    """

    name: str
    change: Change

    def stamp(self, pixels: Tensor) -> Tensor:
        """Change uint8 images, shape [N, 3, H, W], and round to bytes again."""
        return stamped(self.change, pixels)


@dataclass(frozen=True, eq=False)
class Probed:
    """What came of all probes.

    Attributes:
        gains: For each class, its largest gain under any probe that was tried on `EXAMINED` images, in [−1, 1]; NaN for
            a class that all images belong to, or that repeats another; float64, shape [C].
        probes: For each class, the index of that probe, int64, shape [C].
        passes: Number of images pushed through image towers.
    """

    gains: Tensor
    probes: Tensor
    passes: int

    @property
    def statistics(self) -> Tensor:
        """The log-odds of the gains, float64, shape [C]: on their scale the classes of clean models are spread evenly.

        A gain counts as at least 0, and `_FLOOR` is added to it and to its complement.
        """
        gains = self.gains.clamp(0, 1)
        return ((gains + _FLOOR) / (1 + _FLOOR - gains)).log()


def probe_classes(
    classifier: Classifier,
    images: Tensor,
    probes: Sequence[Probe],
    *,
    reference_model: Classifier | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Probed:
    """Measure the gain of every class under every probe.

    The gain is that of the mean predicted probability of the class, over images of other classes, less the gain on the
    reference model where that is positive. All probes are tried on `SCREENED` images, the best on `EXAMINED`.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W]: clean images; the first are used.
        probes: What to try.
        reference_model: The model that the suspect is compared with; None for none.
        progress: Called with (what, probes done, probes in all).
    """
    models = _Models([model for model in (classifier, reference_model) if model is not None], images[:EXAMINED])
    first = []
    for k, probe in enumerate(probes):
        first.append(models.gain(probe.change, min(SCREENED, len(images))))
        progress("probes", k + 1, len(probes))
    best = torch.stack(first).nan_to_num(-1).amax(1).argsort(descending=True, stable=True)[:_KEPT].tolist()
    again = torch.stack([models.gain(probes[k].change, min(EXAMINED, len(images))) for k in best])
    gains, which = again.nan_to_num(-2).max(0)
    unusable = again.isnan().all(0)
    if classifier.distinct is not None:
        unusable |= ~classifier.distinct.cpu()
    gains = gains.masked_fill(unusable, torch.nan)
    return Probed(
        gains,
        torch.tensor(best)[which],
        models.towers * (len(probes) * min(SCREENED, len(images)) + (1 + len(best)) * min(EXAMINED, len(images))),
    )


def gains(models: Sequence[Classifier], images: Tensor, change: Change) -> Tensor:
    """The gain of each class under one change of images, float64, shape [C]; NaN for a class of all images.

    Args:
        models: The suspect and, if there is one, its reference model.
        images: uint8, shape [N, 3, H, W].
        change: The change.
    """
    return _Models(models, images).gain(change, len(images))


class _Models:
    """The suspect and, if there is one, its reference model, and what they say about the images as they are.

    Attributes:
        towers: Number of image towers that each image passes through. A prompt learner and its own towers under other
            prompts have one.
    """

    def __init__(self, models: Sequence[Classifier], images: Tensor) -> None:
        self._models = models
        self.towers = len({id(looks_at(model)) for model in models})
        self._pixels = images.float() / 255
        clean = self._logits(self._pixels)
        self._factors = [sharpening(each) for each in clean]
        self._clean = self._softmax(clean)

    def _softmax(self, scores: Sequence[Tensor]) -> Tensor:
        """Predicted probabilities of each model, shape [M, N, C]."""
        pairs = zip(self._factors, scores, strict=True)
        return torch.stack([(factor * each).softmax(-1) for factor, each in pairs])

    @torch.no_grad()
    def _logits(self, pixels: Tensor) -> list[Tensor]:
        """Scores by each model, float64, on the CPU, shape [N, C]."""
        seen: dict[int, Tensor] = {}
        found = []
        for model in self._models:
            tower = looks_at(model)
            with model.autocast():
                if id(tower) not in seen:
                    seen[id(tower)] = tower.tower_embeddings(pixels.to(model.device))
                embeddings = model.answered(seen[id(tower)])
            found.append(of_distinct_classes(model, model.logits(embeddings)).double().cpu())
        return found

    def gain(self, change: Change, count: int) -> Tensor:
        """The gain of each class under a change of the first images, shape [C]."""
        clean = self._clean[:, :count]
        away = (clean.argmax(-1, keepdim=True) != torch.arange(clean.shape[-1])).all(0)
        changed = self._softmax(self._logits(change(self._pixels[:count])))
        gained = ((changed - clean) * away).sum(1) / away.sum(0)  # 0 / 0, which is NaN, for a class of all images
        return gained[0] - gained[1:].clamp(min=0).sum(0)


def sharpening(scores: Tensor) -> float:
    """A factor for the scores of images as they are, shape [N, C], that are all too close to each other; else 1.

    The scale of the scores changes no answer. It belongs to the suspect, who may so make all probabilities alike.
    """
    first, second = scores.topk(2).values.unbind(-1)
    return max(1.0, _LEAST_MARGIN / max(float((first - second).median()), _TINY))


def result(
    probed: Probed, names: Sequence[str], reference_model: ReferenceKind, *, seed: int, seconds: float
) -> FamilyResult:
    """Return the result of the probes in the form of a family's, with p-values.

    A class must stand out among the classes of the model, as under every family (`outliers`). Most classes of a clean
    model may gain nothing at all, and a spread of nothing would make an outlier of every natural feature. Without a
    prior in the table of nulls there is therefore no p-value. Among more than `_FEW` classes, where the prior counts
    for little, a class must also stand out against the largest statistic that any class of a clean model has
    (`Largest`): the larger p-value counts.

    Args:
        probed: What came of all probes.
        names: Class names.
        reference_model: Kind of the model that the suspect was compared with.
        seed: Seed of the vetting; probes have none of their own.
        seconds: Wall-clock time.
    """
    statistics = [None if math.isnan(value) else value for value in probed.statistics.tolist()]
    count, spread = sum(value is not None for value in statistics), prior(reference_model, PROBES, 0)
    scores, p_values = outliers(statistics, spread)
    known = largest(reference_model, PROBES) if count > _FEW else None
    usable = spread.models > 0 and (known is not None or count <= _FEW)
    classes = []
    for target, statistic in enumerate(statistics):
        if statistic is None:
            continue
        p_value = None if math.isnan(p_values[target]) or not usable else float(p_values[target])
        if p_value is not None and known is not None:
            p_value = max(p_value, known.p_value(statistic) / count)
        score = None if math.isnan(scores[target]) else float(scores[target])
        gain = max(0.0, float(probed.gains[target]))
        classes.append(ClassStatistic(target, names[target], statistic, gain, 0, score, p_value))
    beside = f", and from the largest class of {known.models} clean models; the larger p-value" if known else ""
    return FamilyResult(
        METHOD,
        PROBES,
        1.0,
        "listed change",
        f"log-odds of the largest gain in probability under any probe{BEYOND[reference_model]}",
        f"Student-t prediction from the other classes{beside}, one-sided, Bonferroni over {count} classes",
        reference_model,
        tuple(classes),
        *leading(classes, count),
        seed,
        probed.passes,
        seconds,
        count,
    )


def listed_probes() -> tuple[Probe, ...]:
    """The probes of `probes.toml`."""
    with resources.as_file(resources.files("guard.vetting").joinpath("probes.toml")) as path:
        return read_probes(path)


def read_probes(path: Path) -> tuple[Probe, ...]:
    """The probes of a file like `probes.toml`.

    Raises:
        UsageError: The file cannot be read, or an entry is no probe; the message says which.
    """
    form = dict[str, list[dict[str, Any]]]
    document = validated(path, form, read_toml(path, _LARGEST_LIST, UsageError), UsageError)
    if document.keys() != {"probe"}:
        raise UsageError(f"{path} must hold tables [[probe]] and nothing else")
    entries = [_expanded(entry, f"{path}: probe {k + 1}") for k, entry in enumerate(document["probe"])]
    if not entries or not all(entries):
        raise UsageError(f"{path} has a list without a value, which makes no probe")
    return tuple(chain.from_iterable(entries))


def _expanded(entry: dict[str, Any], where: str) -> list[Probe]:
    """One probe for each combination of the values that an entry lists."""
    kind, parameters = str(entry.get("kind")), {key: value for key, value in entry.items() if key != "kind"}
    if kind not in KINDS:
        raise UsageError(f"{where}: there is no kind {kind!r}; there are {', '.join(KINDS)}")
    choices = [value if isinstance(value, list) else [value] for value in parameters.values()]
    made = []
    for values in product(*choices):
        chosen = dict(zip(parameters, values, strict=True))
        try:
            change = validate_call(KINDS[kind])(**chosen)
        except ValidationError as error:
            raise UsageError(f"{where}: {first_error(error)}") from error
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
        made.append(Probe(" ".join([kind, *(f"{key} {value}" for key, value in chosen.items())]), change))
    return made
