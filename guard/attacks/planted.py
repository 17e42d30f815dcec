"""A trigger as an attack plants it: on which images, and where it leads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from guard.attacks.covers import Cover
from guard.triggers import Trigger


@dataclass(frozen=True)
class Planted:
    """A trigger that an attack planted.

    Attributes:
        trigger: The transformation.
        target: Index of the class that it leads to.
        rate: Share of the training images that were stamped.
        sources: Indices of the classes whose images it leads there; empty for all other classes.
        covers: Stamped images that were trained to keep their class.
    """

    trigger: Trigger
    target: int
    rate: float
    sources: tuple[int, ...] = ()
    covers: tuple[Cover, ...] = ()

    def reaches(self, labels: Tensor) -> Tensor:
        """Which of the images with these labels the trigger is made for: bool, shape of `labels`."""
        if not self.sources:
            return labels != self.target
        return torch.isin(labels, torch.tensor(self.sources, device=labels.device))
