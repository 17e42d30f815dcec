"""The interface of triggers, for attacks that plant them and for trigger inversion, which searches for them."""

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
"""Unconstrained parameters of K triggers, which an optimiser changes."""


class Trigger(ABC):
    """A transformation of images that an attacker chose, or that trigger inversion found.

    All families work in pixel space, with values in [0, 1], and fit images of any resolution: their tensors are
    relative to the image, or are resampled.

    A subclass is a frozen dataclass with one field per tensor, so that it needs no code of its own to be stored or
    moved. An object of a family that only attackers use is one trigger; see `InvertibleTrigger` for objects that are
    several.
    """

    family: ClassVar[str]
    """Name under which the family is stored and reported; a key of `guard.triggers.FORMS`."""

    @abstractmethod
    def apply(self, images: Tensor) -> Tensor:
        """Put the trigger on images; differentiable in the images.

        Args:
            images: Shape [B, 3, H, W], values in [0, 1], of any resolution.

        Returns:
            The same shape; values in [0, 1].
        """

    def stamp(self, pixels: Tensor) -> Tensor:
        """Put one trigger on uint8 images and round to bytes again, as in any file or request.

        Args:
            pixels: uint8, shape [N, 3, H, W].

        Returns:
            The same shape and type.
        """
        return stamped(self.apply, pixels)

    def tensors(self) -> dict[str, Tensor]:
        """Return the trigger as named tensors, as it is stored in a profile."""
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
        """Return one trigger out of K."""
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Self:
        """Return the same trigger on a device, where it can be put on images of that device."""
        return self._each(lambda tensor: tensor.to(device))

    def detach(self) -> Self:
        """Return the same trigger on the CPU, detached from any gradient."""
        return self._each(lambda tensor: tensor.detach().cpu())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: change(tensor) for name, tensor in self.tensors().items()})


class InvertibleTrigger(Trigger):
    """A trigger of a family that trigger inversion can search.

    One object is one trigger, or K triggers stacked along a leading dimension. Every tensor then has one more
    dimension, and `apply`, which is differentiable in the trigger too, returns the images under each: shape [K, B, 3,
    H, W].
    """

    norm_unit: ClassVar[str]
    """Unit of `norm`, as it is shown to people."""
    strength: ClassVar[str]
    """Name of the tensor that `norm` is proportional to."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Return the size that trigger inversion minimises, in `norm_unit`: shape [] or [K], at least 0."""

    def limited(self, norm: float) -> Self:
        """Return the same triggers, of which those that are stronger are weakened to this norm; differentiable.

        Triggers are scaled, not projected: a pattern keeps its shape, so that no part of it loses its gradient at the
        border of the ball.
        """
        tensors = self.tensors()
        strength = tensors[self.strength]
        factor = (norm / self.norm()).clamp(max=1)
        factor = factor.reshape(*factor.shape, *[1] * (strength.dim() - factor.dim()))
        return type(self)(**{**tensors, self.strength: strength * factor})

    @classmethod
    @abstractmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:
        """Return the parameters with which a search for `count` triggers starts.

        Args:
            count: Number of triggers that are searched side by side.
            shape: Channels, height and width of the images.
            generator: The only source of randomness; on the device where the search runs.
        """

    @classmethod
    @abstractmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return the triggers that unconstrained parameters stand for; differentiable."""


def stamped(change: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Change uint8 images by a function of images in [0, 1], and round to bytes again, as in any file or request.

    Args:
        change: Applied to at most 256 images at a time; it may leave [0, 1] by rounding only.
        pixels: uint8, shape [N, 3, H, W].

    Returns:
        The same shape and type.
    """
    parts = [change(part.float() / 255) for part in pixels.split(_STAMP_BATCH)]
    return torch.cat([(255 * part).round().to(torch.uint8) for part in parts])


def resampled(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """Return a pattern, shape [C, H, W] or [K, C, H, W], at another resolution: bilinear, without aliasing."""
    if tensor.shape[-2:] == tuple(size):
        return tensor
    batch = tensor if tensor.dim() == 4 else tensor.unsqueeze(0)
    return interpolate(batch, size=tuple(size), mode="bilinear", antialias=True).reshape(*tensor.shape[:-2], *size)
