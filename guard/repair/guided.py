"""Guided repair: PAR's two forces, where the reconstructed trigger says what to move."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from guard.classifiers.classifier import Classifier
from guard.classifiers.tuning import Inputs, TuningSettings, tune
from guard.repair.cases import Candidate, Case, Images, TargetedTrigger
from guard.repair.perturb_recover import TAU
from guard.repair.searching import SEARCH, search_triggers
from guard.repair.stamping import mixed, stamped, varied_all
from guard.repair.switch import halfway
from guard.vetting.budgets import InspectionSettings
from guard.vetting.disturbances import disturbed

_VIEWS = 4
"""Views of each image in a step: as it is, with a trigger, with another change, and mixed with another image."""


@dataclass(frozen=True)
class Guided:
    """Push images with a trigger away from where the suspect puts them, and pull them to where it puts them without.

    PAR (arXiv 2412.00727) does not know the trigger: it drives *clean* images away from the poisoned model's embeddings
    and lets pairs of images and captions bring a meaning back, which turns the whole space of embeddings and needs 10⁵
    pairs. Here the reconstructed trigger is known, so that only images with a trigger are driven away, up to the same
    τ and for the first part of the training only, and the suspect's own embeddings of clean images are what all images
    are brought back to. This needs neither labels nor captions, and keeps the space as it was.

    The attacker's trigger is not the reconstructed one, and often of another family. Therefore further triggers of the
    target class are searched for where the training starts, in every family (adversarial unlearning, Zeng et al.,
    "I-BAU", ICLR 2022, uses additive perturbations), all triggers are used at different strengths, and images are also
    changed in the ways of `guard.vetting.disturbances`.

    With a base model of the same architecture, the training starts from the suspect with modules of the base
    (`guard.repair.Switch`), in which triggers of families that no search covers have lost most of their effect as well.
    So that few images do not teach the model themselves, it is kept where the suspect is at mixtures of them.

    Attributes:
        starts: Number of starts of the search in each family.
        away: Weight of the force away from the suspect's embeddings of images with a trigger.
        answer: Weight of the cross entropy of the right answers: the labels or, where they are not known, the answers
            that the suspect gives without a trigger.
        share: Part of the training during which that force acts, in [0, 1].
        keep: Weight of 1 − cosine between the embeddings of mixtures and those that the suspect gives them. More keeps
            more of the accuracy, and of triggers of other families.
        search: How each search is done.
        tuning: Steps, rates and schedule.
    """

    starts: int = 1
    away: float = 0.5
    answer: float = 0.1
    share: float = 0.25
    keep: float = 0.3
    search: InspectionSettings = SEARCH
    tuning: TuningSettings = field(
        default_factory=lambda: TuningSettings(steps=150, learning_rate=5e-4, weight_decay=0.0, schedule="falling")
    )

    name: ClassVar[str] = "guided"
    uses_triggers: ClassVar[bool] = True

    def candidates(self, case: Case) -> Iterator[Candidate]:
        """See `guard.repair.Method`: one candidate."""
        # All views of an image are in one pass.
        at_once = max(1, self.tuning.forward_batch // _VIEWS)
        known, settings = case.needs_triggers(self.name), replace(self.tuning, seed=case.seed, forward_batch=at_once)
        start = halfway(case, "repaired by guided perturbation")
        pupil, passes = start.classifier, start.passes
        found, searched = search_triggers(
            replace(case, suspect=pupil), sorted({each.target for each in known}), self.search, starts=self.starts
        )
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
        # The suspect sees each image once, and then the triggered and the mixed view in each step.
        passes += searched + len(case.images) + (_VIEWS + 2) * cost.steps * min(settings.batch, len(case.images))
        yield Candidate(pupil, passes, {"triggers": len(known) + len(found)})


class _Guided:
    """The loss: three views of each image are brought to one embedding, and mixtures are kept where they are."""

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
        triggered = stamped(clean.to(device), varied_all(self._triggers, generator), generator)
        other = disturbed(clean, generator).to(device)
        mixtures = mixed(clean, generator).to(device)
        with torch.no_grad(), self._suspect.autocast():
            parts = torch.cat([triggered, mixtures]).split(self._method.tuning.forward_batch)
            poisoned, kept = torch.cat([self._suspect.encode_images(part) for part in parts]).split(len(clean))
        return (
            clean.to(device),
            triggered,
            other,
            mixtures,
            self._wanted[index].to(device),
            self._answers[index].to(device),
            poisoned,
            kept,
        )

    def embed(self, inputs: Inputs) -> Inputs:
        with self._pupil.autocast():
            embeddings = self._pupil.encode_images(torch.cat(inputs[:_VIEWS]))
        return tuple(embeddings.split(len(inputs[0])))

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:
        (clean, triggered, other, mixtures), (wanted, answers, poisoned, kept) = embeddings, inputs[_VIEWS:]
        views = clean, triggered, other
        back = torch.stack([(1 - (each * wanted).sum(1)).mean() for each in views]).mean()
        back = back + self._method.keep * (1 - (mixtures * kept).sum(1)).mean()
        if self._method.answer:
            right = [cross_entropy(self._suspect.logits(each), answers) for each in views]
            back = back + self._method.answer * torch.stack(right).mean()
        if done >= self._method.share:
            return back
        distance = (triggered - poisoned).square().sum(1).mean()
        return back - self._method.away * (distance <= TAU) * distance / 2
