"""Every family of triggers, by name."""

from guard.triggers.additive import Additive
from guard.triggers.base import InvertibleTrigger, Trigger
from guard.triggers.blend import Blend
from guard.triggers.coded import Coded
from guard.triggers.colour_map import ColourMap
from guard.triggers.compression import Compression
from guard.triggers.filter import Filter
from guard.triggers.frequency import Frequency
from guard.triggers.generator import Generator
from guard.triggers.large_patch import LargePatch
from guard.triggers.moving_patch import MovingPatch
from guard.triggers.patch import Patch
from guard.triggers.quantisation import Quantisation
from guard.triggers.sinusoid import Sinusoid
from guard.triggers.warp import Warp

FAMILIES: dict[str, type[InvertibleTrigger]] = {
    family.family: family for family in (Patch, Additive, Blend, Warp, Frequency, ColourMap, Generator, LargePatch)
}
"""The families that trigger inversion can search and that a profile can hold, by name."""

KINDS: dict[str, type[Trigger]] = {
    **FAMILIES,
    **{family.family: family for family in (MovingPatch, Sinusoid, Filter, Coded, Compression, Quantisation)},
}
"""All families, including those that only attackers use, by name."""
