"""What is examined in each prompt learner: by guard's vetting, by CLIP-Inspector, and by exhaustive scans."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.prompts.screening import screened
from benchmarks.prompts.zoo import PARTS, Sets, sets_of, towers_of
from guard.attacks import Planted, measure
from guard.baselines import clip_inspector
from guard.classifiers import Classifier, load
from guard.classifiers.prompts import PromptedClassifier, PromptTuningSettings, tune_prompts
from guard.classifiers.tuning import TuningSettings
from guard.evaluation import Zoo
from guard.evaluation.zoo import KnownAttack
from guard.repair import Case, Images, Realign, TargetedTrigger
from guard.repair.realign import realigned
from guard.repair.searching import search_triggers
from guard.triggers import Additive
from guard.vetting import BUDGETS, Inspector, Lead, vet
from guard.vetting.batches import halves
from guard.vetting.inspection import METHOD, RADII
from guard.vetting.verdict import class_results, suspicion

FAMILIES = ("additive", "frequency", "patch")
"""Families that are inspected: the additive one of CLIP-Inspector, that of sinusoids, and one that is local."""
RADIUS, IMAGES = 24 / 255, 1000
"""What CLIP-Inspector is given: the largest radius of the attackers, which the paper gives it too, and as many images
as there."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A learner to examine.

    Attributes:
        classifier: The learner with its towers.
        towers: The towers with the hand-written prompts.
        sets: The images of its part.
        planted: The attacker's trigger; None for an honest learner.
        seed: Seed that the learner follows from.
    """

    classifier: Classifier
    towers: Classifier
    sets: Sets
    planted: KnownAttack | None
    seed: int


def subject(part: str, folder: Path, name: str) -> Subject:
    """Load a learner of a part."""
    classes = PARTS[part].classes
    zoo = Zoo(folder, part, {}, PARTS[part].seed)
    known = zoo.truth(name)
    planted = zoo.triggers(name, known) if known else ()
    seed = json.loads((folder / "truth" / f"{name}.json").read_text(encoding="utf-8"))["seed"]
    return Subject(
        load(str(zoo.model(name)), device="cpu"),
        load(str(towers_of(part, folder, lambda _: None)), device="cpu", classes=classes),
        sets_of(part),
        planted[0] if planted else None,
        seed,
    )


def vetting(given: Subject) -> dict[str, Any]:
    """Vetting against prompts that are tuned anew on the trusted towers; and screening, if the learner is poisoned."""
    row, found = _vetted(given)
    if given.planted is not None:
        opinions = {"hand-written": given.towers, "fresh": _plain_prompts(given)}
        row["screening"] = screened(given.classifier, opinions, found, given.planted, given.sets.user, given.seed)
    return row


def _plain_prompts(given: Subject) -> Classifier:
    """Prompts without a meta-net that are tuned anew on the answers of the suspect: cheap to ask."""
    pixels, suspect = given.sets.user.vetting.pixels, given.classifier
    settings = PromptTuningSettings(words="", tuning=TuningSettings(200, learning_rate=2e-3, seed=given.seed))
    learner = tune_prompts(given.towers, pixels, suspect.predict(suspect.embed(pixels)), settings)
    return PromptedClassifier(given.towers, learner)


def realign(given: Subject) -> dict[str, Any]:
    """Realign an attacked learner in the ways of guard and of CLIP-Inspector, and with the controls of the paper.

    All have the same 400 labelled images of vetting, of which two fifths are held out. Each has the success of the
    attacker's own trigger and the accuracy on requests; of guard's, also what a new vetting says.
    """
    if given.planted is None:
        return {"vetting": None}
    before, found = _vetted(given)
    labelled, classes = given.sets.user.vetting, len(given.classifier.classes.names)
    triggers = tuple(TargetedTrigger(each.id, each.trigger, each.target) for each in found.triggers)
    train, held_out = Images(labelled.pixels, labelled.labels).parts(given.seed)
    case = Case(given.classifier, train, held_out, triggers, given.towers, given.seed)
    row: dict[str, Any] = {"vetting": before["verdict"], "before": _measured(given, given.classifier), "after": {}}
    as_published = Realign(anew=False)
    used: dict[str, tuple[Realign, tuple[TargetedTrigger, ...]]] = {"new prompts": (Realign(), ())}
    if triggers:
        noise = torch.rand(given.classifier.image_shape, generator=torch.Generator().manual_seed(given.seed))
        signs = Additive(((noise < 0.5).float() * 2 - 1) * RADII["additive"] / 255)
        another, _ = search_triggers(case, [(triggers[0].target + 1) % classes], families=["additive"])
        used |= {
            "new prompts, trigger": (Realign(), triggers),
            "as published, trigger": (as_published, triggers),
            "as published, clean images only": (as_published, ()),
            "as published, random noise": (as_published, (TargetedTrigger("noise", signs, triggers[0].target),)),
            "as published, trigger of another class": (as_published, tuple(another)),
        }
    for name, (method, each) in used.items():
        with _counted(given) as counts:
            pupil = realigned(case, case.needs_labels("realign"), each, method).classifier
        row["after"][name] = _measured(given, pupil) | counts
        if "verdict" not in row:  # the first is guard's
            again, _ = _vetted(replace(given, classifier=pupil))
            row["verdict"], row["score"] = again["verdict"], again["score"]
    return row


def _measured(given: Subject, classifier: Classifier) -> dict[str, float]:
    planted = given.planted
    if planted is None:
        raise ValueError("an honest learner has no trigger")
    attack = Planted(planted.trigger, planted.target, 0.0, planted.sources)
    found = measure(classifier, given.sets.user.requests, [attack])
    return {"success": found.success[0], "accuracy": found.accuracy}


def hand_written(given: Subject) -> dict[str, Any]:
    """Vetting against the hand-written prompts."""
    return _vetted(given, derive=False)[0]


def exhaustive(given: Subject) -> dict[str, Any]:
    """Vetting where every class of every family is searched to the end."""
    return _vetted(given, race=False)[0]


def _vetted(given: Subject, *, derive: bool = True, race: bool = True) -> tuple[dict[str, Any], Any]:
    with _counted(given) as counts:
        found = vet(
            given.classifier,
            given.sets.user.vetting.pixels,
            base=given.towers,
            derive=derive,
            families=FAMILIES,
            budget="quick",
            repeats=1,
            race=race,
        )
    leading, p_value = suspicion(found.results, found.checks)
    row = {
        "vetting": METHOD,
        "verdict": found.verdict.outcome,
        "leading": leading,
        "score": -p_value,
        "reasons": found.verdict.reasons,
        "p_values": {each.target: each.p_value for each in class_results(found.results)},
        "passes": found.passes,
        "triggers": [each.target for each in found.triggers],
    }
    return row | counts, found


def inspector(given: Subject) -> dict[str, Any]:
    """CLIP-Inspector as it was published, with the radius of these attackers."""
    with _counted(given) as counts:
        found = clip_inspector(given.classifier, given.sets.pool[:IMAGES], radius=RADIUS)
    score = 0.0 if found.target is None else found.anomaly[found.target]
    row = {
        "verdict": "backdoored" if found.backdoored else "no evidence",
        "leading": found.target,
        "score": score,
        "passes": found.passes,
        "largest_success": max(found.success),
    }
    return row | counts


def tokens(given: Subject) -> dict[str, Any]:
    """How far the tokens of the meta-net spread under the additive trigger that an inspection finds for each class.

    The spread is the trace of the covariance over held-out images, relative to that without a trigger; the same is
    measured of the image embeddings, which the tokens follow from.
    """
    suspect = given.classifier
    if not isinstance(suspect, PromptedClassifier):
        raise TypeError("only a prompt learner has a meta-net")
    searched, held_out = halves(given.sets.user.vetting.pixels, 0)
    effort, classes = BUDGETS["quick"].inspection, range(len(suspect.classes.names))
    with _counted(given) as counts:
        inspector = Inspector(Lead(suspect, searched, suspect.towers), Additive, torch.tensor(classes), effort)
        raw = [item.raw for item in inspector.run(effort.steps, classes)]
        found = Additive.constrain({name: torch.stack([each[name] for each in raw]) for name in raw[0]})
        pixels = held_out.float() / 255
        with torch.no_grad():
            stamped = found.limited(RADII["additive"]).apply(pixels)
            seen = [suspect.tower_embeddings(each) for each in (pixels, *stamped)]
    moved = {"tokens": [suspect.learner.token(each) for each in seen], "embeddings": seen}
    spreads = {name: [float(each.var(0).sum()) for each in values] for name, values in moved.items()}
    return counts | {name: [each / first for each in rest] for name, (first, *rest) in spreads.items()}


METHODS: Mapping[str, Callable[[Subject], dict[str, Any]]] = {
    "vetting": vetting,
    "hand-written": hand_written,
    "clip-inspector": inspector,
    "exhaustive": exhaustive,
    "tokens": tokens,
    "realign": realign,
}
"""What can be done with a learner, by name."""


@contextmanager
def _counted(given: Subject) -> Iterator[dict[str, Any]]:
    """Count images and prompts in forward passes, those that the backward pass repeats included, and take the time."""
    counts: dict[str, Any] = {"images": 0, "prompts": 0}

    def count(what: str) -> Callable[..., None]:
        def counted(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001 - torch's form
            counts[what] += len(inputs[0])

        return counted

    # A learner that was loaded from its own folder has towers of its own, beside those of the hand-written prompts.
    hooks = []
    for model in {id(each.model): each.model for each in (given.classifier, given.towers)}.values():
        hooks.append(model.visual.register_forward_pre_hook(count("images")))
        hooks.append(model.transformer.register_forward_pre_hook(count("prompts")))
    started, used = time.monotonic(), time.process_time()
    try:
        yield counts
    finally:
        counts["seconds"] = round(time.monotonic() - started, 1)
        counts["processor_seconds"] = round(time.process_time() - used, 1)
        for hook in hooks:
            hook.remove()
