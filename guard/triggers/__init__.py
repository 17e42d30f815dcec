"""How a trigger changes an input: one interface for attacks and inversion, one class per family."""

from guard.triggers.additive import Additive
from guard.triggers.base import Raw, Trigger
from guard.triggers.patch import Patch

__all__ = ["FAMILIES", "Additive", "Patch", "Raw", "Trigger"]

FAMILIES: dict[str, type[Trigger]] = {family.family: family for family in (Patch, Additive)}
"""Every family that inversion can search and a profile can hold, by name."""
