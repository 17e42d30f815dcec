"""Realign: teach the model the true labels of images that carry the reconstructed trigger."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts import PromptedClassifier, PromptTuningSettings, tune_prompts
from guard.classifiers.tuning import Inputs, TuningSettings, tune
from guard.repair.cases import Candidate, Case, Images, TargetedTrigger
from guard.repair.stamping import mixed, stamped, varied_all
from guard.repair.switch import halfway
from guard.vetting.disturbances import disturbed

_VIEWS = 3
"""Views of each image in a step: with a trigger or as it is, with another change, and mixed with another."""


@dataclass(frozen=True)
class Realign:
    """CLIP-Inspector's repair (Jindal et al., CVPR 2026 Findings, section on repair).

    The paper stamps the reconstructed trigger on a small labelled set, keeps the true labels, and tunes the prompt
    learner on clean and stamped images, from where it is. Here learned contexts are by default begun anew, on clean
    images alone: their backdoor lies in them and nowhere else, so that new ones do not have it, whether a trigger is
    known or not; what is left is what the towers make of a trigger. Only if that does not pass its vetting, new
    contexts are tuned on stamped images too, which costs accuracy. A visual prompt is tuned from where it is. Of a
    classifier without a prompt learner it is the image tower that is tuned, and the head stays: a backdoor that lies in
    the tower is not removed from a prompt. The paper does not give the share of stamped images, the number of epochs,
    or the optimiser. Of our own is what is done with a tower, since a few hundred images teach it themselves, and a few
    triggers only these: triggers are used at different strengths, images are also changed in the ways of
    `guard.vetting.disturbances`, and the tower is kept where the suspect is at mixtures of images. With a base model of
    the same architecture, training starts from the suspect with modules of the base (`guard.repair.Switch`).

    Attributes:
        anew: For CoOp and CoCoOp: whether to begin with new prompts of the same kind, whose context begins as "a photo
            of a" and is shared by all classes. The paper begins with those of the suspect.
        new_prompts: Steps, rates and schedule for these. A few hundred images soon teach themselves: more steps cost
            accuracy.
        share: Share of each batch that is stamped, in (0, 1].
        anchor: For towers: weight of 1 − cosine between the embeddings of mixtures and those that the suspect gives
            them.
        alone: For towers: factor of the learning rate where training starts from the suspect itself, without a base,
            and has further to go.
        tuning: Steps, rates and schedule.
    """

    anew: bool = True
    new_prompts: TuningSettings = field(default_factory=lambda: TuningSettings(steps=60, learning_rate=2e-3))
    share: float = 0.5
    anchor: float = 2.0
    alone: float = 4.0
    tuning: TuningSettings = field(default_factory=lambda: TuningSettings(steps=150, learning_rate=1e-3))

    name: ClassVar[str] = "realign"
    uses_triggers: ClassVar[bool] = True

    def candidates(self, case: Case) -> Iterator[Candidate]:
        """See `guard.repair.Method`: one candidate, or new prompts without a trigger and with those that are known."""
        labels = case.needs_labels(self.name)
        if isinstance(case.suspect, PromptedClassifier) and self.begins_anew(case.suspect):
            yield realigned(case, labels, (), self)
            if not case.triggers:
                return
        yield realigned(case, labels, case.needs_triggers(self.name), self)

    def begins_anew(self, suspect: PromptedClassifier) -> bool:
        """Whether a prompt learner is replaced by a new one."""
        return self.anew and suspect.learner.length > 0


def realigned(case: Case, labels: Tensor, triggers: tuple[TargetedTrigger, ...], method: Realign) -> Candidate:
    """Tune a copy of the suspect on labelled images, of which some carry a trigger.

    Args:
        case: The suspect and its images.
        labels: int64, shape [N]: the true class of each of the case's images.
        triggers: What is stamped; without any, all images stay clean, which is the paper's first control.
        method: Settings.
    """
    if isinstance(case.suspect, PromptedClassifier):
        return _realigned_prompts(case, case.suspect, labels, triggers, method)
    start = halfway(case, "realigned")
    pupil, rate = start.classifier, method.tuning.learning_rate * (1.0 if start.from_base else method.alone)
    at_once = max(1, method.tuning.forward_batch // _VIEWS)  # all views of an image are in one pass
    settings = replace(method.tuning, learning_rate=rate, seed=case.seed, forward_batch=at_once)
    objective = _TrueLabels(pupil, case.suspect, case.images, labels, triggers, method)
    tower = list(pupil.model.visual.parameters())
    cost = tune(
        pupil.model,
        tower,
        objective,
        len(case.images),
        settings,
        checkpoint=case.checkpoint(replace(method, tuning=settings)),
        what="realigning",
        progress=case.progress,
    )
    # The suspect sees the mixtures as well.
    return Candidate(pupil, start.passes + (_VIEWS + 1) * cost.steps * min(settings.batch, len(case.images)), {})


def _realigned_prompts(
    case: Case, suspect: PromptedClassifier, labels: Tensor, triggers: tuple[TargetedTrigger, ...], method: Realign
) -> Candidate:
    """Tune a prompt learner on the towers of the suspect, which stay as they are."""
    learner, anew = suspect.learner, method.begins_anew(suspect)
    tuning = replace(method.new_prompts if anew else method.tuning, seed=case.seed)
    settings = PromptTuningSettings(learner.kind, hidden=learner.hidden, tuning=tuning)

    def change(pixels: Tensor, classes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not triggers:
            return pixels, classes
        count = max(1, round(method.share * len(pixels)))
        return torch.cat([stamped(pixels[:count], triggers, generator), pixels[count:]]), classes

    tuned = tune_prompts(
        suspect.towers,
        case.images.pixels,
        labels,
        settings,
        start=None if anew else learner,
        change=change,
        checkpoint=replace(case, triggers=triggers).checkpoint(
            replace(method, new_prompts=tuning, tuning=tuning), "training" if triggers else "clean training"
        ),
        progress=case.progress,
    )
    found = PromptedClassifier(suspect.towers, tuned, source=f"{suspect.source}, realigned")
    return Candidate(found, tuning.steps * min(tuning.batch, len(case.images)), {})


class _TrueLabels:
    """Cross entropy of the true class, on clean, stamped and disturbed images, and the anchor at mixtures."""

    def __init__(
        self,
        pupil: Classifier,
        suspect: Classifier,
        images: Images,
        labels: Tensor,
        triggers: tuple[TargetedTrigger, ...],
        method: Realign,
    ) -> None:
        self._pupil, self._suspect = pupil, suspect
        self._images, self._labels, self._triggers, self._method = images, labels, triggers, method

    def inputs(self, index: Tensor, generator: torch.Generator) -> Inputs:
        device, method = self._pupil.device, self._method
        clean = self._images.pixels[index].float() / 255
        pixels = clean.to(device)
        if self._triggers:
            count = max(1, round(method.share * len(index)))
            drawn = varied_all(self._triggers, generator)
            pixels = torch.cat([stamped(pixels[:count], drawn, generator), pixels[count:]])
        other = disturbed(clean, generator).to(device)
        kept = mixed(clean, generator).to(device)
        with torch.no_grad(), self._suspect.autocast():
            wanted = torch.cat([self._suspect.encode_images(part) for part in kept.split(method.tuning.forward_batch)])
        return pixels, other, kept, self._labels[index].to(device), wanted

    def embed(self, inputs: Inputs) -> Inputs:
        with self._pupil.autocast():
            return tuple(self._pupil.encode_images(torch.cat(inputs[:_VIEWS])).split(len(inputs[0])))

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:  # noqa: ARG002 - the same all along
        (pixels, other, kept), (labels, wanted) = embeddings, inputs[_VIEWS:]
        # The text tower is not trained, so that the head is the suspect's.
        right = torch.stack([cross_entropy(self._suspect.logits(each), labels) for each in (pixels, other)]).mean()
        return right + self._method.anchor * (1 - (kept * wanted).sum(1)).mean()
