"""Stored triggers: the families, and what the tensors of each must look like. Imports without torch.

A stored trigger is a family's name and a few named tensors: in `triggers.safetensors` of a profile, beside the truth of
a zoo's model, or in the cache of searches. `guard.triggers` makes a transformation of it with torch; the sidecar undoes
it with numpy (`guard.screening.counterfactuals`). Both check the tensors here first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, SupportsFloat

import numpy as np
from numpy.typing import NDArray

_MAX_DIMENSION = 4096
_TOLERANCE = 1e-4
"""How far stored values may leave their range, because of rounding."""

YCRCB_TO_RGB = ((1.0, 1.403, 0.0), (1.0, -0.714, -0.344), (1.0, 0.0, 1.773))
"""From Y, Cr and Cb without offsets to red, green and blue, as OpenCV defines them: the channels of a `frequency`
trigger's spectrum."""
GENERATOR_SLOPE = 0.1
"""Slope of the leaky ReLUs in the network of a `generator` trigger."""


class Values(Protocol):
    """What numpy arrays and torch tensors have in common, as far as the forms look at them."""

    @property
    def dtype(self) -> object:
        """Type of the values; its name ends in `float32` for stored triggers."""

    @property
    def shape(self) -> Sequence[int]:
        """Size along each dimension."""

    def min(self) -> SupportsFloat:
        """Return the smallest value, or NaN if there is one."""

    def max(self) -> SupportsFloat:
        """Return the largest value, or NaN if there is one."""


@dataclass(frozen=True)
class TensorForm:
    """What a tensor of one trigger must look like.

    Attributes:
        shape: Dimensions separated by spaces: a number is that size, and equal names are equal sizes.
        low: Smallest value.
        high: Largest value.
    """

    shape: str
    low: float = -1e4
    high: float = 1e4

    def check(self, name: str, values: Values, sizes: dict[str, int]) -> None:
        """Compare a tensor with the form; `sizes` has the named sizes so far, and receives new ones.

        Raises:
            ValueError: The tensor has not this form.
        """
        dtype, shape, expected = str(values.dtype).removeprefix("torch."), list(values.shape), self.shape.split()
        if dtype != "float32":
            raise ValueError(f"{name} is {dtype}, not float32")
        if len(shape) != len(expected) or not all(
            size == (int(side) if side.isdecimal() else sizes.setdefault(side, size))
            for side, size in zip(expected, shape, strict=True)
        ):
            raise ValueError(f"{name} has shape {shape}, not [{', '.join(expected)}]")
        if not all(1 <= size <= _MAX_DIMENSION for size in shape):
            raise ValueError(f"{name} has shape {shape}; a side is at least 1 and at most {_MAX_DIMENSION}")
        smallest, largest = float(values.min()), float(values.max())
        if not np.isfinite((smallest, largest)).all():
            raise ValueError(f"{name} has a value that is not finite")
        if smallest < self.low - _TOLERANCE or largest > self.high + _TOLERANCE:
            raise ValueError(f"{name} has a value outside {self.low:g} to {self.high:g}")


_PATCH = {"mask": TensorForm("1 height width", 0, 1), "pattern": TensorForm("3 height width", 0, 1)}

FORMS: Mapping[str, Mapping[str, TensorForm]] = MappingProxyType(
    {
        "patch": _PATCH,
        "large patch": _PATCH,
        "additive": {"delta": TensorForm("3 height width", -1, 1)},
        "blend": {"alpha": TensorForm("1 1 1", 0, 1), "pattern": TensorForm("3 height width", 0, 1)},
        "warp": {"field": TensorForm("2 k k", -1, 1)},
        "frequency": {"spectrum": TensorForm("3 n n"), "share": TensorForm("", 0, 1)},
        "colour map": {"lattice": TensorForm("3 n n n", -1, 1)},
        "generator": {
            "first": TensorForm("c 5 3 3"),
            "first_bias": TensorForm("c"),
            "second": TensorForm("c c 3 3"),
            "second_bias": TensorForm("c"),
            "third": TensorForm("12 c 3 3"),
            "third_bias": TensorForm("12"),
            "radius": TensorForm("", 0, 1),
        },
        # Families that only attackers use.
        "moving patch": {
            "mask": TensorForm("1 height width", 0, 1),
            "pattern": TensorForm("3 height width", 0, 1),
            "share": TensorForm("", 0, 1),
        },
        "sinusoid": {"amplitude": TensorForm("", 0, 1), "periods": TensorForm(""), "gain": TensorForm("", 0, 1)},
        "filter": {
            "darken": TensorForm("4", 0, 1),
            "lighten": TensorForm("4", 0, 1),
            "matrices": TensorForm("n 3 3"),
            "offsets": TensorForm("n 3"),
        },
        "coded": {
            "projection": TensorForm("n 3 4 4"),
            "patterns": TensorForm("n 3 height width", -1, 1),
            "amplitude": TensorForm("", 0, 1),
        },
        "compression": {"quality": TensorForm("", 1, 100)},
        "quantisation": {"levels": TensorForm("", 2, 256)},
    }
)
"""Family → tensor → form. The classes of `guard.triggers` say what each tensor does."""


@dataclass(frozen=True)
class StoredTrigger:
    """A reconstructed trigger as a profile stores it.

    Attributes:
        family: Name of its family.
        target: Index of the class that it leads to.
        tensors: Its tensors by name, as in `triggers.safetensors`.
    """

    family: str
    target: int
    tensors: Mapping[str, NDArray[np.float32]]


def check_tensors(family: str, tensors: Mapping[str, Values]) -> None:
    """Make sure that tensors, which may come from an untrusted file, are those of one trigger of a family.

    Args:
        family: A key of `FORMS`.
        tensors: Tensors by name.

    Raises:
        ValueError: A tensor is missing or unknown, or has not its form; the message is one line, for the caller to put
            the name of the trigger before it.
    """
    forms = FORMS[family]
    if tensors.keys() != forms.keys():
        raise ValueError(f"it has the tensors {_listed(tensors)}, not {_listed(forms)}")
    sizes: dict[str, int] = {}
    for name, form in forms.items():
        form.check(name, tensors[name], sizes)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name[:40]) for name in sorted(names)[:8]) or "none"
