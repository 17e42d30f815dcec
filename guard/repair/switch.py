"""Switch: take every second module of the image tower from the base model."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from guard.classifiers.classifier import Classifier
from guard.errors import UsageError
from guard.repair.cases import Candidate, Case
from guard.repair.measuring import answers, moved

AGREEING = 0.8
"""Smallest share of held-out images to which modules of two models answer as the suspect does, to train on them."""


@dataclass(frozen=True)
class Switch:
    """Module switching with the base model, without training.

    "Module Switching Defense" (ICLR 2026) puts a model together from modules of two fine-tuned models, so that the
    modules which carry a backdoor together are parted. Its rules forbid modules of one source that follow each other,
    and an evolutionary search finds the assignment that breaks them least. Here the second model is the base, and the
    two assignments that break no rule about neighbours are tried, which take the even or the odd modules from the
    suspect, and the mean of both models (weight averaging, the paper's own rival). Running statistics of batch
    normalisation are measured anew on clean images.

    Attributes:
        batch: Images in each forward pass that measures statistics.
    """

    batch: int = 64

    name: ClassVar[str] = "switch"
    uses_triggers: ClassVar[bool] = False

    def candidates(self, case: Case) -> Iterator[Candidate]:
        """See `guard.repair.Method`: three candidates, that which keeps most answers and follows no trigger first."""
        if case.base is None:
            raise UsageError("the method switch needs the base model; give it with --base")
        case.suspect.check_comparable(case.base)
        if not same_architecture(case.suspect, case.base):
            raise UsageError("the method switch needs a base model of the same architecture")
        ours, theirs = (_tensors(each) for each in (case.suspect, case.base))
        groups = _groups(case.suspect.model.visual)
        shares = {
            "even": [float(k % 2 == 0) for k in range(len(groups))],
            "odd": [float(k % 2 == 1) for k in range(len(groups))],
            "mean": [0.5] * len(groups),
        }
        kept = answers(case.suspect, case.held_out)
        found = []
        for done, (name, share) in enumerate(shares.items()):
            model = copy.deepcopy(case.suspect.model)
            state = model.visual.state_dict()
            with torch.no_grad():
                for part, names in zip(share, groups, strict=True):
                    for each in names:
                        if state[each].is_floating_point():
                            state[each].copy_(part * ours[each] + (1 - part) * theirs[each])
            candidate = case.suspect.with_model(model, f"{case.suspect.source}, modules switched: {name}")
            self._measure_statistics(candidate, case)
            agreeing = float((answers(candidate, case.held_out) == kept).float().mean())
            success = [moved(candidate, each.trigger, each.target, case.held_out) for each in case.triggers]
            passes = len(case.images) + (1 + 2 * len(success)) * len(case.held_out)
            found.append((agreeing - max(success, default=0.0), Candidate(candidate, passes, {"modules": name})))
            case.progress("switching modules", done + 1, len(shares))
        yield from (each for _, each in sorted(found, key=lambda pair: -pair[0]))

    def _measure_statistics(self, classifier: Classifier, case: Case) -> None:
        norms = [each for each in classifier.model.visual.modules() if isinstance(each, nn.BatchNorm2d)]
        if not norms:
            return
        for each in norms:
            each.reset_running_stats()
            each.momentum = None  # a plain mean over all batches
            each.train()
        classifier.embed(case.images.pixels, self.batch)
        for each in norms:
            each.momentum = 0.1
            each.eval()


@dataclass(frozen=True, eq=False)
class Start:
    """A model to train from.

    Attributes:
        classifier: The model.
        from_base: Whether modules of the base are in it; otherwise it is a copy of the suspect.
        passes: Number of image passes that it cost to make.
    """

    classifier: Classifier
    from_base: bool
    passes: int


def halfway(case: Case, how: str) -> Start:
    """Return a model to train from: the suspect with modules of its base, or a copy of it where no base fits.

    In a model that is put together in this way, a trigger has lost most of its effect whatever its family is. Where it
    answers otherwise than the suspect too often (`AGREEING`), too much is lost to start from it.

    Args:
        case: The suspect, and perhaps a base.
        how: What will be done to the model, such as `realigned`.
    """
    if case.base is None or not same_architecture(case.suspect, case.base):
        return Start(case.copy(how), from_base=False, passes=0)
    found = list(Switch().candidates(case))
    start, passes = found[0].classifier, sum(each.passes for each in found) + 2 * len(case.held_out)
    same = answers(start, case.held_out) == answers(case.suspect, case.held_out)
    if float(same.float().mean()) < AGREEING:
        return Start(case.copy(how), from_base=False, passes=passes)
    return Start(case.suspect.with_model(start.model, f"{case.suspect.source}, {how}"), from_base=True, passes=passes)


def same_architecture(one: Classifier, other: Classifier) -> bool:
    """Whether the image towers of two classifiers consist of tensors of the same names and shapes."""
    shapes = [
        {name: each.shape for name, each in classifier.model.visual.state_dict().items()} for classifier in (one, other)
    ]
    return shapes[0] == shapes[1]


def _tensors(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: each.to(classifier.device) for name, each in classifier.model.visual.state_dict().items()}


def _groups(tower: nn.Module) -> list[list[str]]:
    """Names of the tensors of each module, in the order of the tower: a matrix, and the vectors that follow it."""
    groups: list[list[str]] = []
    for name, tensor in tower.state_dict().items():
        if tensor.ndim > 1 or not groups:
            groups.append([])
        groups[-1].append(name)
    return groups
