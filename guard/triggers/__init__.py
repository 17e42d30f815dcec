"""How a trigger changes an input: one interface for attacks and inversion, one class per family."""

from guard.triggers.additive import Additive
from guard.triggers.base import InvertibleTrigger, Raw, Trigger
from guard.triggers.blend import Blend
from guard.triggers.colour_map import ColourMap
from guard.triggers.filter import Filter
from guard.triggers.frequency import Frequency
from guard.triggers.generator import Generator
from guard.triggers.known import KNOWN, KnownTrigger
from guard.triggers.moving_patch import MovingPatch
from guard.triggers.patch import Patch
from guard.triggers.sinusoid import Sinusoid
from guard.triggers.warp import Warp

__all__ = [
    "FAMILIES",
    "KINDS",
    "KNOWN",
    "Additive",
    "Blend",
    "ColourMap",
    "Filter",
    "Frequency",
    "Generator",
    "InvertibleTrigger",
    "KnownTrigger",
    "MovingPatch",
    "Patch",
    "Raw",
    "Sinusoid",
    "Trigger",
    "Warp",
]

FAMILIES: dict[str, type[InvertibleTrigger]] = {
    family.family: family for family in (Patch, Additive, Blend, Warp, Frequency, ColourMap, Generator)
}
"""Every family that inversion can search and a profile can hold, by name."""

KINDS: dict[str, type[Trigger]] = {
    **FAMILIES,
    **{family.family: family for family in (MovingPatch, Sinusoid, Filter)},
}
"""Every family, also those that only attackers use, by name."""
