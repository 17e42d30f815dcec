"""Repair a classifier, and find out whether it is repaired."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import ImageError, UsageError
from guard.repair.cases import Candidate, Case, Images, Method, TargetedTrigger
from guard.repair.guided import Guided
from guard.repair.measuring import Drift, Measured, answers, drift, measure
from guard.repair.perturb_recover import PerturbRecover
from guard.repair.realign import Realign
from guard.repair.searching import search_triggers
from guard.repair.subtract import Subtract
from guard.repair.switch import Switch
from guard.vetting import Budget, Conclusion, TextVetting, Verdict, Vetting, vet, vet_text
from guard.vetting.examination import MIN_IMAGES as MIN_VETTING_IMAGES
from guard.vetting.probes import Probe
from guard.vetting.text_examination import without_prompts

METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (Guided, Realign, PerturbRecover, Subtract, Switch)
}
"""Every method, by name."""
LEFT = 0.1
"""Largest share of held-out images that a trigger known before may still move in a model that is called repaired."""
ALLOWED_LOSS = 0.03
"""Largest loss of accuracy (without labels, share of changed answers) of a model that is called repaired."""
_TRIES = 3
"""Most candidates of one round that are vetted."""

Outcome = Literal["repaired", "not repaired", "undecided", "nothing to repair"]
"""What can come of a repair; `Repair.outcome` says when."""


@dataclass(frozen=True)
class Repair:
    """What a repair did, and what came of it.

    Attributes:
        outcome: `repaired` only if the verdict of a new vetting is `no evidence`, the triggers known before move at
            most `LEFT` of held-out images, and at most `ALLOWED_LOSS` of the accuracy is lost, or without labels of
            the answers changed; `undecided` if the new verdict, or that of the text tower, is `inconclusive`.
        reasons: Sentences that explain it, the most important first.
        method: Name of the method.
        settings: Its settings.
        choices: What it chose by itself, such as α.
        suspect: Root digest of the model before.
        model: Root digest of the model after; that of the suspect where nothing was changed.
        verdict_before: Conclusion about the suspect.
        verdict: Conclusion of the new vetting; None where nothing was changed.
        images: Number of images trained on, and number held out.
        before: The suspect on the held-out images.
        after: The new model on them.
        drift: How far embeddings moved.
        rounds: How often the method was applied to this model; again, with the triggers that the new vetting found.
        passes: Images pushed through image towers by the method, in all rounds.
        vetting_passes: The same by the new vettings.
        seconds: Wall-clock time of this run.
        seed: Seed for all random choices.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    method: str
    settings: Mapping[str, Any]
    choices: Mapping[str, float | str]
    suspect: str
    model: str
    verdict_before: Conclusion
    verdict: Conclusion | None
    images: tuple[int, int]
    before: Measured
    after: Measured
    drift: Drift
    rounds: int
    passes: int
    vetting_passes: int
    seconds: float
    seed: int

    @property
    def revokes(self) -> bool:
        """Whether the suspect is to be refused from now on: it was accused, or a repaired model takes its place."""
        return self.outcome == "repaired" or self.verdict_before == "backdoored"


@dataclass(frozen=True, eq=False)
class Repaired:
    """The result of a repair.

    Attributes:
        classifier: The new model, or the suspect where nothing was found to repair.
        vetting: Its vetting; None where nothing was changed.
        repair: The record.
        text: The vetting of its text tower; None where nothing was changed, or nobody asked for it.
    """

    classifier: Classifier
    vetting: Vetting | None
    repair: Repair
    text: TextVetting | None = None


def repair(
    suspect: Classifier,
    method: Method,
    images: Images,
    *,
    verdict: Verdict,
    triggers: Sequence[TargetedTrigger] = (),
    base: Classifier | None = None,
    vetting_images: Tensor | None = None,
    budget: Budget = "standard",
    probes: Sequence[Probe] | None = None,
    text_tower: bool = False,
    rounds: int = 2,
    anyway: bool = False,
    seed: int = 0,
    store: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Repaired:
    """Change a copy of a classifier so that its triggers no longer work, and vet the copy.

    Args:
        suspect: The classifier; it is not changed.
        method: An object of one of `METHODS`.
        images: Clean images; two fifths of them are held out from all training, for the measurements and the vetting.
        verdict: What vetting concluded about the suspect.
        triggers: The triggers that vetting reconstructed. Where it accuses a class and has none, since a fixed change
            of images accused it, a method that uses triggers gets some that are searched for first.
        base: The trusted model that the suspect was tuned from.
        vetting_images: uint8, shape [N, 3, H, W]: other images for the new vetting; None for those held out.
        budget: Effort of the new vetting; not less than that of the vetting before, or it may miss what that found.
        probes: Fixed changes that the new vetting tries; None for those of guard's own list.
        text_tower: Whether the text tower of the new model is vetted as well, as it must be if that of the suspect was.
        rounds: How often the method may be applied. After the first, it starts from the model that did not pass and
            also uses the triggers that were found in that.
        anyway: Whether to work on a model for which the verdict is `no evidence`.
        seed: Seed for all random choices.
        store: Folder for training and finished searches, so that an interrupted run continues.
        progress: Called with (what, steps done, steps in all).

    Raises:
        ImageError: There are too few images, also for the new vetting.
        UsageError: The method needs triggers, labels or a base model, and there are none; the base model does not fit;
            or the suspect has a prompt learner, and the method changes towers.
    """
    started = time.monotonic()
    if rounds < 1:
        raise UsageError(f"a repair takes at least one round, not {rounds}")
    prompted = isinstance(suspect, PromptedClassifier)
    if prompted and not isinstance(method, Realign):
        raise UsageError(f"the method {method.name} changes towers; a prompt learner is repaired by realign")
    if base is not None:
        suspect.check_comparable(base)
    if text_tower:
        without_prompts(suspect, base)  # what would be refused after the training is refused now
    train, held_out = images.parts(seed)
    searched = held_out.pixels if vetting_images is None else vetting_images
    if len(searched) < MIN_VETTING_IMAGES:
        raise ImageError(f"the new vetting needs at least {MIN_VETTING_IMAGES} images, there are {len(searched)}")
    first = Case(suspect, train, held_out, tuple(triggers), base, seed, store, progress)
    before = measure(suspect, held_out, first.triggers)

    def record(
        outcome: Outcome,
        reasons: Sequence[str],
        candidate: Candidate,
        vettings: tuple[Vetting, TextVetting | None] | None,
        done: int,
        passes: tuple[int, int],
    ) -> Repaired:
        found, (vetting, text) = candidate.classifier, vettings or (None, None)
        return Repaired(
            found,
            vetting,
            Repair(
                outcome,
                tuple(reasons),
                method.name,
                asdict(method),  # type: ignore[call-overload]  # methods are dataclasses
                candidate.choices,
                suspect.digest.root,
                found.digest.root,
                verdict.outcome,
                vetting.verdict.outcome if vetting else None,
                (len(train), len(held_out)),
                before,
                measure(found, held_out, first.triggers),
                drift(suspect, found, held_out),
                done,
                *passes,
                time.monotonic() - started,
                seed,
            ),
            text,
        )

    if verdict.outcome == "no evidence" and not anyway:
        reason = "nothing was found to repair: vetting has no evidence of a backdoor in the families that it tested"
        return record("nothing to repair", [reason], Candidate(suspect, 0, {}), None, 0, (0, 0))
    cache = store / "searches" if store else None

    def examined(found: Classifier) -> tuple[Vetting, TextVetting | None]:
        image = vet(
            found, searched, base=base, budget=budget, probes=probes, seed=seed, cache=cache, progress=progress
        )  # fmt: skip
        if not text_tower:
            return image, None
        return image, vet_text(found, base=base, budget=budget, seed=seed, cache=cache, progress=progress)

    known = answers(suspect, held_out)
    case, trained, vetted = first, 0, 0
    if verdict.target is not None and not triggers and method.uses_triggers and not prompted:
        # A probe has accused it. Triggers that are searched for here are trained on; whether they are natural features
        # nobody checked, so that they say nothing about whether the model is repaired. New prompts need none.
        further, trained = search_triggers(first, [verdict.target])
        case = replace(first, triggers=tuple(further))
    tried: list[_Tried] = []
    for done in range(1, rounds + 1):
        earlier = len(tried)
        for candidate in islice(method.candidates(case), _TRIES):
            trained += candidate.passes
            vetting, text = examined(candidate.classifier)
            vetted += vetting.passes
            agreement = float((answers(candidate.classifier, held_out) == known).float().mean())
            after = measure(candidate.classifier, held_out, first.triggers)
            reasons = _objections(vetting, text, before, after, agreement)
            tried.append(_Tried(candidate, vetting, text, reasons, done))
            if not reasons:
                break
        last = min(tried[earlier:], key=lambda each: each.badness)
        if not last.reasons or not (method.uses_triggers and last.vetting.triggers):
            break
        more = (
            TargetedTrigger(f"{each.id}, round {done}", each.trigger, each.target) for each in last.vetting.triggers
        )
        case = replace(
            case,
            suspect=last.candidate.classifier,
            triggers=(*case.triggers, *more),
            store=store / f"round-{done + 1}" if store else None,
        )
    # Another round may make it worse.
    best = min(tried, key=lambda each: each.badness)
    outcome: Outcome = "repaired"
    if best.reasons:
        outcome = "undecided" if len(best.reasons) == len(best.doubts) else "not repaired"
    said = best.reasons or ["a new vetting has no evidence of a backdoor in the families that it tested"]
    return record(outcome, said, best.candidate, (best.vetting, best.text), best.done, (trained, vetted))


@dataclass(frozen=True, eq=False)
class _Tried:
    """One candidate, what vetting says of it, why it is not repaired, and the round that it comes from."""

    candidate: Candidate
    vetting: Vetting
    text: TextVetting | None
    reasons: list[str]
    done: int

    @property
    def doubts(self) -> list[Verdict]:
        """The verdicts that are `inconclusive`."""
        verdicts = [self.vetting.verdict, *([self.text.verdict] if self.text else [])]
        return [verdict for verdict in verdicts if verdict.outcome == "inconclusive"]

    @property
    def badness(self) -> tuple[bool, int, int, float]:
        """Orders candidates, the best first: repaired, then undecided, then those with few objections."""
        certain = len(self.reasons) - len(self.doubts)
        return len(self.reasons) > 0, certain, len(self.reasons), -self.vetting.verdict.p_value


def _objections(
    vetting: Vetting, text: TextVetting | None, before: Measured, after: Measured, agreement: float
) -> list[str]:
    """Why a model is not repaired, as sentences; empty if it is."""
    found = []
    for tower, verdict in (("", vetting.verdict), (" of the text tower", text.verdict if text else None)):
        if verdict is not None and verdict.outcome != "no evidence":
            found.append(f"the verdict of the new vetting{tower} is {verdict.outcome}: {'; '.join(verdict.reasons)}")
    for name, share in after.success.items():
        if share > LEFT:
            found.append(
                f"the trigger {name} still moves {share:.0%} of held-out images; at most {LEFT:.0%} may be left"
            )
    if before.accuracy is not None and after.accuracy is not None and before.accuracy - after.accuracy > ALLOWED_LOSS:
        found.append(f"accuracy on held-out images fell from {before.accuracy:.1%} to {after.accuracy:.1%}")
    if before.accuracy is None and 1 - agreement > ALLOWED_LOSS:
        found.append(
            f"{1 - agreement:.0%} of the answers to held-out images changed; without labels, at most "
            f"{ALLOWED_LOSS:.0%} may"
        )
    return found
