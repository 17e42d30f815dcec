"""Trigger inversion: reconstruct the smallest trigger of a family that leads to a class.

The evidence of vetting is what a trigger of limited strength can do (`guard.vetting.inspection`). The trigger itself,
as small as it can be, is what people look at, what is checked on held-out images, and what screening stamps on its
bank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.triggers import InvertibleTrigger, Raw
from guard.vetting.batches import batches
from guard.vetting.budgets import SearchSettings
from guard.vetting.lead import Lead, margin, of_distinct_classes


@dataclass(frozen=True)
class Reconstruction:
    """The best trigger that was found for one class.

    Attributes:
        target: Class index.
        trigger: The smallest trigger that reached the success rate, under whatever weight of the norm, or the last one
            tried where none did.
        norm: Its norm, in the family's unit.
        reached: Whether the success rate was reached while the norm was being minimised.
        success: Share of held-out images of other classes that it moves to the class, in [0, 1].
        reference_success: The same on the reference model; None without one.
        passes: Number of images pushed through image towers to find and check it.
    """

    target: int
    trigger: InvertibleTrigger
    norm: float
    reached: bool
    success: float
    reference_success: float | None
    passes: int


def reconstruct(
    lead: Lead,
    family: type[InvertibleTrigger],
    held_out: Tensor,
    targets: Tensor,
    settings: SearchSettings,
    *,
    start: Raw | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Reconstruction]:
    """Search for the smallest trigger of a family for each of several classes, side by side.

    The loss is the positive part of `Lead.distance` plus a margin, so that for images which already go to the
    target only the norm counts. Images that are in a class without a trigger say nothing about triggers for that class,
    and are left out.

    Args:
        lead: Measures how far each class is from winning, on the images to search on; against a reference model if it
            has one, on which the trigger must not work.
        family: Family of triggers that is searched.
        held_out: uint8, shape [M, 3, H, W]: images to check on.
        targets: int64, shape [K]: candidate classes.
        settings: How much work to do.
        start: Unconstrained parameters to start from, such as those that `Inspector` found; the default is the start of
            the family.
        progress: Called with the number of steps that are done, after each; it may end before the last.

    Returns:
        One reconstruction per target, in order.
    """
    search = _Search(lead, family, targets, settings, start)
    search.run(progress)
    return [_check(lead, held_out, result) for result in search.results()]


class _Search:
    """State of one search over K classes. Classes that are done leave the batch, so that late steps are cheap."""

    def __init__(
        self,
        lead: Lead,
        family: type[InvertibleTrigger],
        targets: Tensor,
        settings: SearchSettings,
        start: Raw | None,
    ) -> None:
        device, count = lead.classifier.device, len(targets)
        self.lead, self.family, self.settings = lead, family, settings
        self.targets = targets.to(device)
        generator = torch.Generator(device).manual_seed(settings.seed)
        cold = family.start(count, lead.classifier.image_shape, generator)
        self.raw = {
            name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in (start or cold).items()
        }
        with torch.no_grad():
            self.scale = family.constrain(cold).norm()
        self.best = {name: tensor.detach().clone() for name, tensor in self.raw.items()}
        self.best_weight = torch.zeros(count, device=device)
        self.best_norm = torch.full((count,), torch.inf, device=device)
        self.weight = torch.full((count,), settings.weight, device=device)
        self.successes = torch.zeros(count, dtype=torch.long, device=device)
        self.failures = torch.zeros_like(self.successes)
        self.improved = torch.zeros_like(self.successes)
        self.vain = torch.zeros_like(self.successes)
        self.passes = torch.zeros_like(self.successes)

    def run(self, progress: Callable[[int], None]) -> None:
        settings = self.settings
        optimiser = torch.optim.Adam(self.raw.values(), lr=settings.learning_rate, betas=(0.5, 0.9))
        active = torch.arange(len(self.targets), device=self.targets.device)
        stream = batches(len(self.lead.images), settings.batch, settings.seed)
        for step, index in zip(range(settings.steps), stream, strict=False):
            loss = self._step(active, index, step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.lead.check_gradients(self.raw.values())
            optimiser.step()
            stalled = (step - self.improved[active] >= settings.stall) & (self.vain[active] >= _VAIN_SUCCESSES)
            progress(step + 1)
            active = active[~stalled]
            if not len(active):
                return

    def _step(self, active: Tensor, index: Tensor, step: int) -> Tensor:
        settings, lead = self.settings, self.lead
        trigger = self.family.constrain({name: tensor[active] for name, tensor in self.raw.items()})
        targets = self.targets[active]
        eligible = lead.eligible(index, targets)
        count = eligible.sum(1).clamp(min=1)
        distance, descent = lead.descend(
            trigger,
            index,
            targets,
            lambda part, classes, images: (
                ((part + settings.margin).relu() * eligible[classes, images]).sum(1) / count[classes]
            ).sum(),
        )
        norm = trigger.norm()
        with torch.no_grad():
            self.passes[active] += len(index) * lead.towers
            rate = ((distance < 0) * eligible).sum(1) / count
            self._remember(active, norm.detach(), rate >= settings.success, step)
        return descent + (self.weight[active] * norm / self.scale[active]).sum()

    def _remember(self, active: Tensor, norm: Tensor, success: Tensor, step: int) -> None:
        """Keep the triggers that are smaller than the smallest so far, and change the weight of the norm."""
        better = success & (norm < self.best_norm[active])
        clearly = success & (norm < 0.99 * self.best_norm[active])
        chosen = active[better]
        self.best_norm[chosen] = norm[better]
        self.best_weight[chosen] = self.weight[chosen]
        self.improved[active[clearly]] = step
        self.vain[active] = torch.where(clearly, 0, self.vain[active] + success)
        for name, tensor in self.raw.items():
            self.best[name][chosen] = tensor.detach()[chosen]
        self.successes[active] = torch.where(success, self.successes[active] + 1, 0)
        self.failures[active] = torch.where(success, 0, self.failures[active] + 1)
        up, down = self.successes >= self.settings.patience, self.failures >= self.settings.patience
        self.weight = torch.where(up, self.weight * self.settings.factor, self.weight)
        self.weight = torch.where(down, self.weight / self.settings.factor, self.weight)
        self.successes[up] = 0
        self.failures[down] = 0

    def results(self) -> Iterator[Reconstruction]:
        """Yield the triggers that were found, not yet checked on held-out images."""
        # A search that reaches a class only after giving up on the norm has not found a minimal one.
        reached = self.best_norm.isfinite() & (self.best_weight >= _PRESSURE * self.settings.weight)
        found = self.best_norm.isfinite()
        with torch.no_grad():
            final = {
                name: torch.where(found.view(-1, *[1] * (tensor.dim() - 1)), self.best[name], tensor.detach())
                for name, tensor in self.raw.items()
            }
            triggers = self.family.constrain(final)
        norms = triggers.norm()
        for k, target in enumerate(self.targets.tolist()):
            yield Reconstruction(
                target,
                triggers[k].detach(),
                float(norms[k]),
                reached=bool(reached[k]),
                success=0.0,
                reference_success=None,
                passes=int(self.passes[k]),
            )


_PRESSURE = 0.5
"""Smallest weight of the norm, relative to its initial value, under which a success counts. On the digits models
searches that converged ended at 2 or more, and those that did not ended below 0.1."""
_VAIN_SUCCESSES = 5
"""Number of successes without a smaller norm before a class may be done. A class that still fails has not converged,
and needs a smaller weight of its norm first."""


@dataclass(frozen=True)
class Effect:
    """What a trigger does on images that were not used to find it.

    Attributes:
        success: Share of images of other classes that it moves to the class, in [0, 1].
        passes: Number of images pushed through the image tower.
    """

    success: float
    passes: int


@torch.no_grad()
def effect(classifier: Classifier, stamp: Callable[[Tensor], Tensor], target: int, images: Tensor) -> Effect:
    """Measure a change on held-out images.

    Args:
        classifier: The suspect, or its reference model.
        stamp: Changes images, uint8, shape [N, 3, H, W], such as `Trigger.stamp`.
        target: Class index.
        images: uint8, shape [N, 3, H, W].
    """

    def logits(pixels: Tensor) -> Tensor:
        return of_distinct_classes(classifier, classifier.logits(classifier.embed(pixels).to(classifier.device)))

    pixels = images[logits(images).argmax(-1).cpu() != target]
    if not len(pixels):
        return Effect(0.0, len(images))
    distance = margin(logits(stamp(pixels))[None], torch.tensor([target], device=classifier.device))[0]
    return Effect(float((distance < 0).float().mean()), len(images) + len(pixels))


def _check(lead: Lead, held_out: Tensor, found: Reconstruction) -> Reconstruction:
    effects = [effect(model, found.trigger.stamp, found.target, held_out) for model in lead.models]
    return replace(
        found,
        success=effects[0].success,
        reference_success=effects[1].success if len(effects) > 1 else None,
        passes=found.passes + sum(each.passes for each in effects),
    )
