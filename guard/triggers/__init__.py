"""How a trigger changes an input: one interface for attacks and for trigger inversion, one class per family.

What stored triggers look like (`guard.triggers.forms`) imports without torch; the classes load torch on first use.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.triggers.forms import FORMS, StoredTrigger, TensorForm, check_tensors

if TYPE_CHECKING:
    from guard.triggers.additive import Additive
    from guard.triggers.base import InvertibleTrigger, Raw, Trigger
    from guard.triggers.blend import Blend
    from guard.triggers.coded import Coded
    from guard.triggers.colour_map import ColourMap
    from guard.triggers.compression import Compression
    from guard.triggers.families import FAMILIES, KINDS
    from guard.triggers.filter import Filter
    from guard.triggers.frequency import Frequency
    from guard.triggers.generator import Generator
    from guard.triggers.known import KNOWN, KnownTrigger
    from guard.triggers.large_patch import LargePatch
    from guard.triggers.moving_patch import MovingPatch
    from guard.triggers.patch import Patch
    from guard.triggers.quantisation import Quantisation
    from guard.triggers.sinusoid import Sinusoid
    from guard.triggers.warp import Warp

__all__ = [
    "FAMILIES",
    "FORMS",
    "KINDS",
    "KNOWN",
    "Additive",
    "Blend",
    "Coded",
    "ColourMap",
    "Compression",
    "Filter",
    "Frequency",
    "Generator",
    "InvertibleTrigger",
    "KnownTrigger",
    "LargePatch",
    "MovingPatch",
    "Patch",
    "Quantisation",
    "Raw",
    "Sinusoid",
    "StoredTrigger",
    "TensorForm",
    "Trigger",
    "Warp",
    "check_tensors",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("FAMILIES", "KINDS"), "families"),
        **dict.fromkeys(("InvertibleTrigger", "Raw", "Trigger"), "base"),
        **dict.fromkeys(("KNOWN", "KnownTrigger"), "known"),
        "Additive": "additive",
        "Blend": "blend",
        "Coded": "coded",
        "ColourMap": "colour_map",
        "Compression": "compression",
        "Filter": "filter",
        "Frequency": "frequency",
        "Generator": "generator",
        "LargePatch": "large_patch",
        "MovingPatch": "moving_patch",
        "Patch": "patch",
        "Quantisation": "quantisation",
        "Sinusoid": "sinusoid",
        "Warp": "warp",
    },
)
