"""One model of a zoo of digits, repaired by one method and measured."""

import functools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks._record import processor
from guard.attacks import LabelledImages, Planted, measure
from guard.classifiers import Classifier, load
from guard.demo import digits
from guard.demo.data import from_digits
from guard.evaluation import Zoo
from guard.profiles import Profile
from guard.repair import (
    Candidate,
    Case,
    Guided,
    Images,
    PerturbRecover,
    Realign,
    Subtract,
    Switch,
    TargetedTrigger,
    drift,
    repair,
)
from guard.repair.realign import realigned
from guard.repair.searching import search_triggers
from guard.triggers import Additive
from guard.vetting import Budget, vet

BUDGET: Budget = "quick"
_PAR = PerturbRecover()
PAR = replace(_PAR, tuning=replace(_PAR.tuning, steps=300, batch=128, learning_rate=1e-3))
"""The published batch and learning rate are for 250,000 pairs and large models."""
REPAIR, MANY = "guard repair", "perturb-recover (3000)"
METHODS: dict[str, Callable[[Case], Iterator[Candidate]]] = {
    "guided": Guided().candidates,
    "realign": Realign().candidates,
    "switch": Switch().candidates,
    "subtract": Subtract().candidates,
    "realign, no base": lambda case: Realign().candidates(replace(case, base=None)),
    "realign: clean images only": lambda case: _control(case, ()),
    "realign: random noise": lambda case: _control(case, _noise(case)),
    "realign: trigger of another class": lambda case: _control(case, _of_another_class(case)),
    MANY: PAR.candidates,
    "guided, no base": lambda case: Guided().candidates(replace(case, base=None)),
    "guided, no labels": lambda case: Guided().candidates(_unlabelled(case)),
    "perturb-recover": PAR.candidates,
}
"""What makes the model of each row of the table; `REPAIR` is a row as well: the whole of `guard.repair.repair`."""
ORDER = (*list(METHODS)[:8], REPAIR, *list(METHODS)[8:])
"""All rows of a model, the most important first."""
TRIGGERLESS = {"switch", MANY, "perturb-recover", "realign: clean images only"}


@dataclass(frozen=True)
class Place:
    """Where a measurement reads and writes.

    Attributes:
        zoo: A zoo of digits.
        out: Folder of its profiles and rows.
    """

    zoo: Path
    out: Path

    def profile(self, name: str) -> Path:
        """The profile of a model."""
        return self.out / "profiles" / name


def vetted(place: Place, name: str) -> None:
    """Vet a model against its base and write its profile."""
    suspect, base = _models(place, name)
    cache = place.out / "searches" / base.digest.root
    pixels = from_digits(seed=0).vetting.pixels
    Profile.build(suspect, vet(suspect, pixels, base=base, budget=BUDGET, cache=cache)).save(place.profile(name))


def measured(place: Place, name: str, method: str) -> dict[str, Any]:
    """Repair a model by a method, and measure both with the attacker's own triggers."""
    zoo = Zoo.read(place.zoo)
    truth = zoo.truth(name)
    if truth is None:
        raise ValueError(f"{name} has no truth")
    suspect, base = _models(place, name)
    profile, small, many = Profile.open(place.profile(name)), from_digits(seed=0).vetting, from_digits(seed=0)
    found, verdict = profile.load_triggers(), profile.document.vetting.verdict
    triggers = tuple(TargetedTrigger(each.id, found[each.id], each.target) for each in profile.document.triggers)
    images = Images(small.pixels, small.labels)
    train, held_out = images.parts(0)
    if method == MANY:
        train = Images(many.calibration.pixels, many.calibration.labels)
    case = Case(suspect, train, held_out, triggers, base, seed=0)
    clean = truth.label == "clean"
    if clean and method not in (REPAIR, *TRIGGERLESS):
        # What a method costs where there is nothing to repair: triggers of a class that a search makes, as on others.
        target = 0 if verdict.target is None else verdict.target
        case = replace(case, triggers=tuple(search_triggers(case, [target])[0]))
    started = time.process_time()
    row: dict[str, Any] = {"choices": {}, "passes": 0, "outcome": None, "verdict": None, "rounds": 1}
    if method == REPAIR and verdict.outcome == "inconclusive" and not triggers:
        model = suspect
        row |= {"outcome": "refused, without a trigger"}
    elif method == REPAIR:
        done = repair(suspect, Guided(), images, verdict=verdict, triggers=triggers, base=base, budget=BUDGET, seed=0)
        model = done.classifier
        row |= {"outcome": done.repair.outcome, "verdict": done.repair.verdict, "rounds": done.repair.rounds}
        row |= {"passes": done.repair.passes, "vetting_passes": done.repair.vetting_passes}
        row |= {"reasons": done.repair.reasons}
    elif case.triggers or method in TRIGGERLESS:
        candidate = next(METHODS[method](case))
        model = candidate.classifier
        row |= {"choices": candidate.choices, "passes": candidate.passes}
    else:
        model = suspect  # vetting has found nothing, so that the method has nothing to work with
    seconds = time.process_time() - started
    planted = [Planted(each.trigger, each.target, 0.0, each.sources) for each in zoo.triggers(name, truth)]
    requests = _requests(1500)
    before, after = (measure(each, requests, planted) for each in (suspect, model))
    unseen = _requests(1500 if method == MANY else 1000)
    accuracy = [_accuracy(each, unseen) for each in (suspect, model)]
    moved = drift(suspect, model, held_out)
    return {
        "zoo": zoo.name,
        "seed": zoo.seed,
        "model": name,
        "recipe": name.removeprefix(f"{zoo.models[name].base}-").rpartition("-")[0],
        "label": truth.label,
        "verdict_before": verdict.outcome,
        "triggers": len(triggers),
        "method": method,
        **row,
        "success": [max(each.success, default=None) for each in (before, after)],
        "accuracy": accuracy,
        "images": len(unseen),
        "cosine": moved.cosine,
        "found": moved.found,
        "agreement": moved.agreement,
        "seconds": round(seconds, 1),
        "machine": f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}",
    }


def _models(place: Place, name: str) -> tuple[Classifier, Classifier]:
    zoo = Zoo.read(place.zoo)
    names = name, str(zoo.models[name].base)
    suspect, base = (load(str(zoo.model(each)), device="cpu") for each in names)
    return suspect, base


@functools.cache
def _requests(first: int) -> LabelledImages:
    """All six drawings of the digits from a number on: those from 1,000 on are in no training set of the zoo."""
    images, original = digits.digits(6, seed=0)
    return images[torch.as_tensor(original >= first)]


def _accuracy(classifier: Classifier, images: LabelledImages) -> float:
    return float((classifier.predict(classifier.embed(images.pixels)) == images.labels).float().mean())


def _unlabelled(case: Case) -> Case:
    return replace(case, images=Images(case.images.pixels), held_out=Images(case.held_out.pixels))


def _control(case: Case, triggers: tuple[TargetedTrigger, ...]) -> Iterator[Candidate]:
    """Without the base, whose modules would hide what the images do."""
    yield realigned(replace(case, base=None), case.needs_labels("realign"), triggers, Realign())


def _noise(case: Case) -> tuple[TargetedTrigger, ...]:
    """Random signs of 16/255: as strong as the inspection lets an additive trigger be."""
    generator = torch.Generator().manual_seed(case.seed)
    signs = torch.randint(0, 2, case.suspect.image_shape, generator=generator).float() * 2 - 1
    return (TargetedTrigger("noise", Additive(signs * 16 / 255), 0),)


def _of_another_class(case: Case) -> tuple[TargetedTrigger, ...]:
    """The additive trigger that inspection finds for the class behind the target."""
    target = (case.triggers[0].target + 1) % len(case.suspect.classes.names)
    found, _ = search_triggers(case, [target], families=["additive"])
    return tuple(found)
