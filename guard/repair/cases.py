"""What a repair starts from, and what every method of repair gives back."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from guard.classifiers.checkpoints import Checkpoint
from guard.classifiers.classifier import Classifier
from guard.classifiers.digest import canonical
from guard.errors import ImageError, UsageError
from guard.triggers import Trigger

HELD_OUT = 0.4
"""Share of the images that no method trains on: for measurements, for a search of α, and for the new vetting."""
MIN_IMAGES = 160
"""Fewest images: the new vetting takes the held-out ones, of which it needs 64."""


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Images:
    """Clean images with what is known about them.

    Attributes:
        pixels: uint8, shape [N, 3, H, W], at the resolution of the model.
        labels: int64, shape [N]: class indices; None where nobody knows them.
        captions: A text for each image; None where there are none.
    """

    pixels: Tensor
    labels: Tensor | None = None
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(
            self.pixels[index],
            None if self.labels is None else self.labels[index],
            None if self.captions is None else tuple(self.captions[k] for k in index.tolist()),
        )

    def parts(self, seed: int) -> tuple["Images", "Images"]:
        """Split at random into the images to train on and those that are held out.

        Raises:
            ImageError: There are fewer than `MIN_IMAGES`.
        """
        if len(self) < MIN_IMAGES:
            raise ImageError(f"a repair needs at least {MIN_IMAGES} images, there are {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = round(HELD_OUT * len(self))
        return self[order[count:]], self[order[:count]]


@dataclass(frozen=True, eq=False)
class TargetedTrigger:
    """A trigger and where it leads.

    Attributes:
        id: Name of the trigger.
        trigger: The transformation.
        target: Class index.
    """

    id: str
    trigger: Trigger
    target: int


@dataclass(frozen=True, eq=False)
class Case:
    """What a method works with.

    Attributes:
        suspect: The model that is to be repaired; it is not changed.
        images: Images to train on.
        held_out: Images to choose among candidates with; none of them is trained on.
        triggers: The reconstructed triggers.
        base: The model that the suspect was tuned from; None if it is not known.
        seed: Seed for all random choices.
        store: Folder in which training is kept; None to keep nothing.
        progress: Called with (what, steps done, steps in all).
    """

    suspect: Classifier
    images: Images
    held_out: Images
    triggers: tuple[TargetedTrigger, ...] = ()
    base: Classifier | None = None
    seed: int = 0
    store: Path | None = None
    progress: Callable[[str, int, int], None] = silent

    def copy(self, how: str) -> Classifier:
        """A copy of the suspect whose weights may be trained.

        Args:
            how: What is done to it, such as `realigned`.
        """
        return self.suspect.with_model(copy.deepcopy(self.suspect.model), f"{self.suspect.source}, {how}")

    def checkpoint(self, settings: object, what: str = "training") -> Checkpoint | None:
        """Where a training of this case is kept.

        Args:
            settings: Dataclass of everything that the training follows from, besides the case itself.
            what: Distinguishes the trainings of one method.
        """
        if self.store is None:
            return None
        held = [self.suspect.digest.root, self.base.digest.root if self.base else None, str(self.suspect.device)]
        digest = hashlib.sha256(canonical([held, repr(settings), self.seed]))
        digest.update(self.images.pixels.numpy().data)
        digest.update(canonical([None if self.images.labels is None else self.images.labels.tolist()]))
        digest.update(canonical(list(self.images.captions or ())))
        for each in self.triggers:
            digest.update(canonical([each.id, each.target]))
            for tensor in each.trigger.detach().tensors().values():
                digest.update(tensor.contiguous().numpy().tobytes())
        return Checkpoint(self.store / f"{what}.safetensors", digest.hexdigest())

    def needs_triggers(self, method: str) -> tuple[TargetedTrigger, ...]:
        """The reconstructed triggers, on the device of the suspect.

        Raises:
            UsageError: There are none.
        """
        if not self.triggers:
            raise UsageError(f"the method {method} needs a reconstructed trigger, and vetting found none")
        device = self.suspect.device
        return tuple(TargetedTrigger(each.id, each.trigger.to(device), each.target) for each in self.triggers)

    def needs_labels(self, method: str) -> Tensor:
        """The labels of the images to train on.

        Raises:
            UsageError: They are not known.
        """
        if self.images.labels is None:
            raise UsageError(
                f"the method {method} needs labelled images: put them into one sub-folder for each class, named like "
                "the class"
            )
        return self.images.labels


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model that may be repaired.

    Attributes:
        classifier: The model.
        passes: Images pushed through image towers for it, as far as they were not counted for an earlier candidate.
        choices: What the method chose for it, such as α, by name.
    """

    classifier: Classifier
    passes: int
    choices: dict[str, float | str]


class Method(Protocol):
    """A method of repair: a frozen dataclass of its settings."""

    name: ClassVar[str]
    uses_triggers: ClassVar[bool]

    def candidates(self, case: Case) -> Iterator[Candidate]:
        """Yield repaired models, the most promising first; the next is asked for if the last did not pass its vetting.

        Raises:
            UsageError: The method needs what the case does not have.
        """
