"""Guided repair: PAR's two forces, where the reconstructed trigger says what to move."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from guard.classifiers.classifier import Classifier
from guard.classifiers.tuning import Inputs, TuningSettings, tune
from guard.repair.cases import Candidate, Case, Images, TargetedTrigger
from guard.repair.perturb_recover import TAU
from guard.repair.stamping import stamped, varied
from guard.triggers import FAMILIES
from guard.vetting.budgets import InspectionSettings
from guard.vetting.disturbances import disturbed
from guard.vetting.inspection import RADII, Inspector
from guard.vetting.lead import Lead

_VIEWS = 3
"""Views of each image in a step: as it is, with a trigger, and with another change."""


@dataclass(frozen=True)
class Guided:
    """Push images with a trigger away from where the suspect puts them, and pull them to where it puts them without.

    PAR (arXiv 2412.00727) does not know the trigger: it drives *clean* images away from the poisoned model's embeddings
    and lets pairs of images and captions bring a meaning back, which turns the whole space of embeddings and needs 10⁵
    pairs. Here the reconstructed trigger is known, so that only images with a trigger are driven away, up to the same
    τ and for the first part of the training only, and the suspect's own embeddings of clean images are what all images
    are brought back to. This needs neither labels nor captions, and keeps the space as it was.

    The attacker's trigger is not the reconstructed one, and often of another family. Therefore further triggers of the
    target class are searched for on the suspect, in every family (adversarial unlearning, Zeng et al., "I-BAU", ICLR
    2022, uses additive perturbations), all triggers are used at different strengths, and images are also changed in
    the ways of `guard.vetting.disturbances`.

    Attributes:
        starts: Number of starts of the search in each family.
        away: Weight of the force away from the suspect's embeddings of images with a trigger.
        answer: Weight of the cross entropy of the right answers: the labels or, where they are not known, the answers
            that the suspect gives without a trigger.
        share: Part of the training during which that force acts, in [0, 1].
        search: How each search is done.
        tuning: Steps, rates and schedule.
    """

    starts: int = 1
    away: float = 0.5
    answer: float = 0.1
    share: float = 0.25
    search: InspectionSettings = field(default_factory=lambda: InspectionSettings(steps=16, batch=32))
    tuning: TuningSettings = field(
        default_factory=lambda: TuningSettings(steps=150, learning_rate=5e-4, weight_decay=0.0, schedule="falling")
    )

    name: ClassVar[str] = "guided"
    uses_triggers: ClassVar[bool] = True

    def candidates(self, case: Case) -> Iterator[Candidate]:
        """See `guard.repair.Method`: one candidate."""
        known, settings = case.needs_triggers(self.name), replace(self.tuning, seed=case.seed)
        found, passes = self.search_for(case, sorted({each.target for each in known}))
        pupil = case.copy("repaired by guided perturbation")
        objective = _Guided(pupil, case.suspect, case.images, (*known, *found), self)
        cost = tune(
            pupil.model,
            list(pupil.model.visual.parameters()),
            objective,
            len(case.images),
            settings,
            checkpoint=case.checkpoint(replace(self, tuning=settings)),
            what="guided repair",
            progress=case.progress,
        )
        # The suspect sees each image once, and then the view with a trigger in each step.
        passes += len(case.images) + (_VIEWS + 1) * cost.steps * min(settings.batch, len(case.images))
        yield Candidate(pupil, passes, {"triggers": len(known) + len(found)})

    def search_for(
        self, case: Case, targets: Sequence[int], families: Sequence[str] = tuple(FAMILIES)
    ) -> tuple[list[TargetedTrigger], int]:
        """Search for triggers of limited strength on the suspect.

        Args:
            case: The suspect and its images.
            targets: Classes that they shall lead to.
            families: Names from `guard.triggers.FAMILIES`.

        Returns:
            A trigger for each class, family and start; and the number of image passes that they cost.
        """
        lead = Lead(case.suspect, case.images.pixels)
        found, passes = [], 0
        rounds = [(name, start) for start in range(self.starts) for name in families]
        for done, (name, start) in enumerate(rounds):
            settings = replace(self.search, seed=case.seed + start)
            inspector = Inspector(lead, FAMILIES[name], torch.tensor(targets), settings)
            for each in inspector.run(settings.steps, targets):
                raw = {part: values[None] for part, values in each.raw.items()}
                trigger = FAMILIES[name].constrain(raw).limited(RADII[name])[0]
                place = f"{name}-{each.target}-{start}"
                found.append(TargetedTrigger(place, trigger.to(case.suspect.device), each.target))
                passes += each.passes
            case.progress("searching for more triggers", done + 1, len(rounds))
        return found, passes


class _Guided:
    """The loss: three views of each image, of which two carry a change, are brought to one embedding."""

    def __init__(
        self,
        pupil: Classifier,
        suspect: Classifier,
        images: Images,
        triggers: tuple[TargetedTrigger, ...],
        method: Guided,
    ) -> None:
        self._pupil, self._suspect, self._images, self._method = pupil, suspect, images, method
        self._triggers = triggers
        self._wanted = suspect.embed(images.pixels)
        self._answers = suspect.predict(self._wanted) if images.labels is None else images.labels

    def inputs(self, index: Tensor, generator: torch.Generator) -> Inputs:
        device = self._pupil.device
        clean = self._images.pixels[index].float() / 255
        factors = (0.6 + torch.rand(len(self._triggers), generator=generator)).tolist()
        drawn = [
            replace(each, trigger=varied(each.trigger, k)) for each, k in zip(self._triggers, factors, strict=True)
        ]
        triggered = stamped(clean.to(device), drawn, generator)
        other = disturbed(clean, generator).to(device)
        with torch.no_grad(), self._suspect.autocast():
            poisoned = self._suspect.encode_images(triggered)
        return (
            clean.to(device),
            triggered,
            other,
            self._wanted[index].to(device),
            self._answers[index].to(device),
            poisoned,
        )

    def embed(self, inputs: Inputs) -> Inputs:
        with self._pupil.autocast():
            embeddings = self._pupil.encode_images(torch.cat(inputs[:_VIEWS]))
        return tuple(embeddings.split(len(inputs[0])))

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:
        wanted, answers, poisoned = inputs[_VIEWS:]
        back = torch.stack([(1 - (each * wanted).sum(1)).mean() for each in embeddings]).mean()
        if self._method.answer:
            right = [cross_entropy(self._suspect.logits(each), answers) for each in embeddings]
            back = back + self._method.answer * torch.stack(right).mean()
        if done >= self._method.share:
            return back
        distance = (embeddings[1] - poisoned).square().sum(1).mean()
        return back - self._method.away * (distance <= TAU) * distance / 2
