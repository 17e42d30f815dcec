"""What a trigger is, for the attacker who plants it and for the inversion that looks for it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from guard.triggers.forms import check_tensors

_STAMP_BATCH = 256

Raw = dict[str, Tensor]
"""Unconstrained parameters of K triggers: what an optimiser moves."""


class Trigger(ABC):
    """A transformation of images that an attacker chose, or that inversion found.

    All families live in pixel space, values in [0, 1], and fit images of any resolution: what they hold is relative to
    the image, or is resampled.

    A subclass is a frozen dataclass of tensors, one field each, so that storing and moving need no code of its own. A
    family that only attackers use holds one trigger; see `InvertibleTrigger` for those that hold many.
    """

    family: ClassVar[str]
    """Name under which the family is stored and reported."""

    @abstractmethod
    def apply(self, images: Tensor) -> Tensor:
        """Put the trigger on images; differentiable in the images.

        Args:
            images: Shape [B, 3, H, W], values in [0, 1], of any resolution.

        Returns:
            The same shape; values in [0, 1].
        """

    def stamp(self, pixels: Tensor) -> Tensor:
        """Put one trigger on uint8 images and round back to bytes, as any file or request would carry it.

        Args:
            pixels: uint8, shape [N, 3, H, W].

        Returns:
            The same shape and type.
        """
        return torch.cat(
            [(self.apply(part.float() / 255) * 255).round().to(torch.uint8) for part in pixels.split(_STAMP_BATCH)]
        )

    def tensors(self) -> dict[str, Tensor]:
        """The trigger as named tensors, as stored in a profile."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the trigger that tensors stand for, the inverse of `tensors`; they may come from an untrusted file.

        Raises:
            ValueError: A tensor is missing or unknown, or has not the form of this family (`guard.triggers.forms`); the
                message is one line, for the caller to put the name of the file before it.
        """
        check_tensors(cls.family, tensors)
        return cls(**tensors)

    def __getitem__(self, index: int) -> Self:
        """One trigger out of K."""
        return self._each(lambda tensor: tensor[index])

    def detach(self) -> Self:
        """The same trigger on the CPU, outside any gradient."""
        return self._each(lambda tensor: tensor.detach().cpu())

    def to(self, device: torch.device) -> Self:
        """The same trigger on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: change(tensor) for name, tensor in self.tensors().items()})


class InvertibleTrigger(Trigger):
    """A trigger of a family that inversion can search.

    One object holds one trigger, or K of them stacked along a leading dimension: every tensor then has one dimension
    more, and `apply`, differentiable in the trigger too, answers for each: shape [K, B, 3, H, W].
    """

    norm_unit: ClassVar[str]
    """Unit of `norm`, for people."""
    strength: ClassVar[str]
    """The tensor that `norm` is proportional to."""

    @abstractmethod
    def norm(self) -> Tensor:
        """How large the trigger is, in `norm_unit`: shape [] or [K], at least 0. Inversion minimises it."""

    def limited(self, norm: float) -> Self:
        """The same triggers, those that are stronger weakened to this norm; differentiable.

        Weakened, not projected: a pattern keeps its shape, so that no part of it loses its gradient at the border of
        the ball.
        """
        tensors = self.tensors()
        strength = tensors[self.strength]
        factor = (norm / self.norm()).clamp(max=1)
        factor = factor.reshape(*factor.shape, *[1] * (strength.dim() - factor.dim()))
        return type(self)(**{**tensors, self.strength: strength * factor})

    @classmethod
    @abstractmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """Where a search for `count` triggers starts.

        Args:
            count: Number of triggers searched side by side.
            shape: Channels, height, width of the images.
            generator: The only source of randomness; on the device where the search runs.
        """

    @classmethod
    @abstractmethod
    def constrain(cls, raw: Raw) -> Self:
        """The triggers that unconstrained parameters stand for; differentiable."""


def resampled(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """A pattern, shape [C, H, W] or [K, C, H, W], at another resolution: bilinear, without aliasing."""
    if tensor.shape[-2:] == tuple(size):
        return tensor
    batch = tensor if tensor.dim() == 4 else tensor.unsqueeze(0)
    return interpolate(batch, size=tuple(size), mode="bilinear", antialias=True).reshape(*tensor.shape[:-2], *size)
