"""Published methods that guard is compared with.

AMDET, CLIP-Inspector, DECREE, BDetCLIP, LoREx, and the density of Huang et al.

None of them is used to vet a model or to screen a request; `guard evaluate` and the benchmarks run them, and `guard
scan` ranks pairs by density. LoREx and the density scores import without torch.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.baselines.density import DAO, LID, SLOF, DensityScore, KDistance
from guard.baselines.lorex import Lorex

if TYPE_CHECKING:
    from guard.baselines.bdetclip import BdetClip
    from guard.baselines.decree import Decree, DecreeSettings, collapse, unregularised
    from guard.baselines.inspector import ClipInspectorResult, clip_inspector
    from guard.baselines.released_amdet import AmdetResult, AmdetSettings, AmdetTests, amdet
    from guard.baselines.released_decree import PublishedSettings

__all__ = [
    "DAO",
    "LID",
    "SLOF",
    "AmdetResult",
    "AmdetSettings",
    "AmdetTests",
    "BdetClip",
    "ClipInspectorResult",
    "Decree",
    "DecreeSettings",
    "DensityScore",
    "KDistance",
    "Lorex",
    "PublishedSettings",
    "amdet",
    "clip_inspector",
    "collapse",
    "unregularised",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("AmdetResult", "AmdetSettings", "AmdetTests", "amdet"), "released_amdet"),
        "BdetClip": "bdetclip",
        **dict.fromkeys(("Decree", "DecreeSettings", "collapse", "unregularised"), "decree"),
        **dict.fromkeys(("ClipInspectorResult", "clip_inspector"), "inspector"),
        "PublishedSettings": "released_decree",
    },
)
