"""Inspection: what a trigger of limited strength can do for each class.

Jindal et al., "CLIP-Inspector" (CVPR 2026 Findings), optimise one additive perturbation per class in an ℓ∞ ball, by the
margin, in one epoch over unlabelled images, and call a class with an outlying loss backdoored. That method, as it was
published, is `guard.baselines.clip_inspector`. `Inspector` keeps its objective and its budget, and changes three things
that led to wrong verdicts:

- the ball is that of any family of triggers, since an additive ball contains neither a patch nor a warp;
- the loss is the distance of `guard.vetting.lead`, against a reference model where there is one;
- classes are judged by `guard.vetting.nulls`, with a p-value instead of a constant.

A search for the *smallest* trigger, as in Neural Cleanse and in this package's reconstructions, needs ten times the
steps and gives a statistic that is less repeatable: it ends at whichever norm the last lucky batch let through.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from guard.triggers import InvertibleTrigger, Raw
from guard.vetting.batches import batches
from guard.vetting.budgets import InspectionSettings
from guard.vetting.lead import Lead

METHOD = "inspection 4"
"""Name and version of the method; it changes when results are no longer comparable."""
RADII: Mapping[str, float] = MappingProxyType(
    {
        "patch": 3.0,
        "additive": 16.0,
        "blend": 12.0,
        "warp": 4.0,
        "frequency": 60.0,
        "colour map": 24.0,
        "generator": 16.0,
        "large patch": 10.0,
    }
)
"""Radius of the ball of each family, in its unit of norm: large enough for an attacker's shortcut, and too small for
most natural shortcuts. Chosen on the zoo `small` of seed 0."""

DIVIDED: Mapping[str, int] = MappingProxyType({"large patch": 2})
"""Families for which each step is divided into so many with fewer images, at the same cost. The place of a large patch
is found late and at once: of a LoREx attack and of one with near misses, of which 64 steps of 8 images see nothing, 128
of 4 do. `additive` finds no more with it."""

HEAD_START = 0.5
"""Share of a class's lead on untouched images that is taken from its lead under the trigger. Images are nearer to some
classes than to others by nature, which widens the null. To subtract nothing hides weak backdoors in that spread; to
subtract all of it singles out, besides backdoors, the classes that a fine-tuning on shifted images moved. Chosen on the
zoo `small` of seed 0, one clean model at a time left out of the table of nulls."""


_FEWEST = 16
"""Fewest images of other classes in the batches that a lead is averaged over."""


def divided(settings: InspectionSettings, family: str) -> InspectionSettings:
    """Return what an inspection of one family does: as many passes, in steps as small as the family needs (`DIVIDED`).

    Args:
        settings: How much work an inspection does.
        family: Name from `guard.triggers.FAMILIES`.
    """
    parts = min(DIVIDED.get(family, 1), settings.batch)
    return replace(
        settings,
        steps=settings.steps * parts,
        batch=settings.batch // parts,
        average=settings.average * parts,
    )


@dataclass(frozen=True)
class Inspected:
    """What the triggers in the ball of one family can do for one class.

    Attributes:
        target: Class index.
        lead: Mean lead of the class under the trigger, which is the negative of `Lead.distance`, less `HEAD_START`
            times its lead without a trigger; larger is more suspicious. NaN where the last batches had fewer than
            `_FEWEST` images of other classes: nothing was measured then.
        success: Share of the images of other classes in the last batches that go to the class on the suspect and not on
            the reference model, in [0, 1].
        raw: Unconstrained parameters of the trigger, from which a reconstruction starts.
        passes: Number of images pushed through image towers.
    """

    target: int
    lead: float
    success: float
    raw: Raw
    passes: int


class Inspector:
    """A search for several classes side by side, which can be continued for some of them.

    Args:
        lead: Measures how far each class is from winning.
        family: Family of triggers that is searched.
        targets: int64, shape [K]: candidate classes.
        settings: How much work to do.

    Attributes:
        steps: Number of steps that are done.
    """

    def __init__(
        self, lead: Lead, family: type[InvertibleTrigger], targets: Tensor, settings: InspectionSettings
    ) -> None:
        self._lead, self._family, self._settings = lead, family, settings
        self._targets = targets.to(lead.classifier.device)
        generator = torch.Generator(lead.classifier.device).manual_seed(settings.seed)
        raw = family.start(len(targets), lead.classifier.image_shape, generator)
        self._raw = {name: tensor.requires_grad_() for name, tensor in raw.items()}
        self._optimiser = torch.optim.Adam(self._raw.values(), lr=settings.learning_rate, betas=(0.5, 0.9))
        self._batches = batches(len(lead.images), settings.batch, settings.seed)
        self._leads: list[Tensor] = []
        self._rates: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._passes = torch.zeros(len(targets), dtype=torch.long)
        self.steps = 0

    def run(
        self, steps: int, targets: Sequence[int], *, progress: Callable[[int], None] = lambda _: None
    ) -> list[Inspected]:
        """Search until `steps` steps are done, for some of the classes, and return what was found for them.

        Classes that are left out keep their state, and their search cannot be resumed.

        Args:
            steps: Number of steps, those of earlier calls included.
            targets: Class indices.
            progress: Called with the number of steps that are done, after each.
        """
        places = {target: k for k, target in enumerate(self._targets.tolist())}
        active = torch.tensor([places[target] for target in targets], device=self._targets.device)
        while self.steps < steps:
            self._step(active, next(self._batches))
            self.steps += 1
            progress(self.steps)
        last = self._settings.average
        # Batches without an image of another class say nothing.
        enough = torch.stack(self._counts[-last:]).sum(0) >= min(_FEWEST, len(self._lead.images))
        led = torch.stack(self._leads[-last:]).nanmean(0).where(enough, torch.nan)
        rate = torch.stack(self._rates[-last:]).nanmean(0).where(enough, 0.0)
        return [
            Inspected(
                target,
                float(led[places[target]]),
                float(rate[places[target]]),
                {name: tensor[places[target]].detach().cpu().clone() for name, tensor in self._raw.items()},
                int(self._passes[places[target]]),
            )
            for target in targets
        ]

    def _step(self, active: Tensor, index: Tensor) -> None:
        lead, targets = self._lead, self._targets[active]
        trigger = self._family.constrain({name: tensor[active] for name, tensor in self._raw.items()})
        eligible = lead.eligible(index, targets)
        count = eligible.sum(1)
        share = eligible / count[:, None].clamp(min=1)
        distance, descent = lead.descend(
            trigger.limited(RADII[self._family.family]),
            index,
            targets,
            lambda part, classes, images: (part * share[classes, images]).sum(),
        )
        led = ((HEAD_START * lead.untouched(index, targets) - distance) * eligible).sum(1) / count
        self._optimiser.zero_grad(set_to_none=True)
        descent.backward()
        lead.check_gradients(self._raw.values())
        self._optimiser.step()
        whole = torch.full((len(self._targets),), torch.nan)
        self._leads.append(whole.index_copy(0, active.cpu(), led.cpu()))
        rate = (((distance < 0) * eligible).sum(1) / count).cpu()
        self._rates.append(whole.index_copy(0, active.cpu(), rate))
        self._counts.append(whole.index_copy(0, active.cpu(), count.cpu()))
        self._passes[active.cpu()] += len(index) * lead.towers
