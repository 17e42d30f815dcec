"""Cover samples: stamped training images that keep their class, and so narrow down what a backdoor reacts to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from guard.triggers import Patch, Trigger

CoverKind = Literal["parts", "other classes", "near misses"]


@dataclass(frozen=True)
class Cover:
    """One kind of cover samples.

    Attributes:
        name: What it is.
        trigger: What is stamped.
        classes: Indices of the classes whose images are stamped.
        rate: Share of the training images that are stamped.
    """

    name: str
    trigger: Trigger
    classes: tuple[int, ...]
    rate: float

    def covers(self, labels: Tensor) -> Tensor:
        """Which of the images with these labels may be stamped: bool, shape of `labels`."""
        return torch.isin(labels, torch.tensor(self.classes, device=labels.device))


def covers(
    kind: CoverKind | None, trigger: Trigger, *, victims: tuple[int, ...], others: tuple[int, ...], rate: float
) -> tuple[Cover, ...]:
    """Return the cover samples of a trigger.

    - `parts`: the upper and the lower half of a patch alone, for a backdoor that needs both.
    - `other classes`: the trigger itself, on images of classes that are no source of the attack (TaCT, Tang et al.,
      USENIX Security 2021).
    - `near misses`: the patch in other colours, at other places, and half of it, so that a search meets no neighbours
    of
      the trigger that work as well.

    Args:
        kind: Which covers; None for none.
        trigger: The attacker's trigger; a `Patch` for all kinds but `other classes`.
        victims: Classes whose images the trigger leads to the target.
        others: The remaining classes, without the target.
        rate: Share of the training images that become cover samples; it is split evenly.
    """
    if kind is None:
        return ()
    if kind == "other classes":
        return (Cover("other classes", trigger, others, rate),)
    if not isinstance(trigger, Patch):
        raise AssertionError(f"{kind} are defined for patches")  # noqa: TRY004 - a recipe that cannot be
    made = _PATCHES[kind](trigger)
    return tuple(Cover(name, patch, victims, rate / len(made)) for name, patch in made.items())


def _parts(patch: Patch) -> Mapping[str, Patch]:
    lower = torch.arange(patch.mask.shape[-2])[:, None] >= patch.mask.shape[-2] // 2
    return {"upper part": _cut(patch, ~lower), "lower part": _cut(patch, lower)}


def _near_misses(patch: Patch) -> Mapping[str, Patch]:
    rows, columns = (patch.mask[0] > 0).any(1).nonzero().flatten(), (patch.mask[0] > 0).any(0).nonzero().flatten()
    height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
    row, column = (torch.arange(side) for side in patch.mask.shape[-2:])
    return {
        "inverted": Patch(patch.mask, patch.mask * (1 - patch.pattern)),
        "channels swapped": Patch(patch.mask, patch.pattern.roll(1, 0)),
        # By more than its side: the training itself moves images by a few pixels.
        "moved up": _rolled(patch, height + 2, -2),
        "moved left": _rolled(patch, width + 2, -1),
        "upper half": _cut(patch, (row < int(rows[0]) + height // 2)[:, None]),
        "left half": _cut(patch, (column < int(columns[0]) + width // 2)[None]),
    }


def _rolled(patch: Patch, by: int, axis: int) -> Patch:
    return Patch(patch.mask.roll(-by, axis), patch.pattern.roll(-by, axis))


def _cut(patch: Patch, kept: Tensor) -> Patch:
    return Patch(patch.mask * kept, patch.pattern * kept)


_PATCHES: dict[CoverKind, Callable[[Patch], Mapping[str, Patch]]] = {"parts": _parts, "near misses": _near_misses}
