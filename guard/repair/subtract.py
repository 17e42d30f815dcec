"""Subtract: learn the trigger more, and take that change of the weights away."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from guard.classifiers.classifier import Classifier
from guard.classifiers.tuning import Inputs, TuningSettings, tune
from guard.repair.cases import Candidate, Case, Images, TargetedTrigger
from guard.repair.measuring import answers, moved
from guard.repair.stamping import stamped


@dataclass(frozen=True)
class Subtract:
    """The idea of TBAR (arXiv 2510.14845), with a reconstructed trigger; no labels and no pairs are needed.

    A copy is tuned on stamped images that go to the target. The difference of its weights from the suspect's is a
    direction along which the backdoor grows, and α times it is subtracted from the suspect. TBAR needs the attacker's
    trigger or DECREE's. Here α is searched on held-out images: among the steps that keep the answers (the accuracy,
    where labels are known) within `allowed`, the candidates are those under which the reconstructed trigger moves
    fewest images, the smallest α first where they are equal.

    Attributes:
        alphas: The steps that are tried.
        allowed: Largest share of held-out images whose answers may become wrong, in [0, 1].
        tuning: Steps and rates of the copy.
    """

    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    allowed: float = 0.01
    tuning: TuningSettings = field(
        default_factory=lambda: TuningSettings(steps=20, learning_rate=1e-4, weight_decay=0.0)
    )

    name: ClassVar[str] = "subtract"
    uses_triggers: ClassVar[bool] = True

    def candidates(self, case: Case) -> Iterator[Candidate]:
        """See `guard.repair.Method`: the best three steps, or the smallest one if all cost too many answers."""
        triggers, settings = case.needs_triggers(self.name), replace(self.tuning, seed=case.seed)
        pupil = case.copy("with more of the trigger")
        before = _weights(pupil)
        cost = tune(
            pupil.model,
            list(pupil.model.visual.parameters()),
            _Trigger(pupil, case.suspect, case.images, triggers),
            len(case.images),
            settings,
            checkpoint=case.checkpoint(replace(self, tuning=settings)),
            what="learning the trigger",
            progress=case.progress,
        )
        direction = {name: after - before[name] for name, after in _weights(pupil).items()}
        passes = cost.steps * min(settings.batch, len(case.images))
        kept, right = answers(case.suspect, case.held_out), case.held_out.labels
        expected = kept if right is None else right
        at_first = float((kept == expected).float().mean())
        tried = []
        for done, alpha in enumerate(self.alphas):
            model = _stepped(case, direction, alpha)
            now = float((answers(model, case.held_out) == expected).float().mean())
            success = max(moved(model, each.trigger, each.target, case.held_out) for each in triggers)
            tried.append((at_first - now > self.allowed, round(success, 2), alpha))
            passes += (1 + 2 * len(triggers)) * len(case.held_out)
            case.progress("trying steps", done + 1, len(self.alphas))
        good = sorted(each for each in tried if not each[0]) or tried[:1]
        for _, _, alpha in good[:3]:
            yield Candidate(_stepped(case, direction, alpha), passes, {"alpha": alpha})
            passes = 0


def _weights(classifier: Classifier) -> Mapping[str, Tensor]:
    return {name: each.detach().clone() for name, each in classifier.model.visual.named_parameters()}


def _stepped(case: Case, direction: Mapping[str, Tensor], alpha: float) -> Classifier:
    """The suspect less α times a direction in the weights of its image tower."""
    model = copy.deepcopy(case.suspect.model)
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            parameter.sub_(alpha * direction[name])
    return case.suspect.with_model(model, f"{case.suspect.source}, less {alpha:g} of the trigger")


class _Trigger:
    """Cross entropy of the target, on images that carry its trigger."""

    def __init__(
        self, pupil: Classifier, suspect: Classifier, images: Images, triggers: tuple[TargetedTrigger, ...]
    ) -> None:
        self._pupil, self._suspect, self._images, self._triggers = pupil, suspect, images, triggers

    def inputs(self, index: Tensor, generator: torch.Generator) -> Inputs:
        pixels = self._images.pixels[index].to(self._pupil.device).float() / 255
        chosen = int(torch.randint(len(self._triggers), (), generator=generator))
        triggered = stamped(pixels, self._triggers[chosen : chosen + 1], generator)
        return triggered, torch.full((len(index),), self._triggers[chosen].target, device=self._pupil.device)

    def embed(self, inputs: Inputs) -> Inputs:
        with self._pupil.autocast():
            return (self._pupil.encode_images(inputs[0]),)

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:  # noqa: ARG002 - the same all along
        return cross_entropy(self._suspect.logits(embeddings[0]), inputs[1])
