"""Examine a classifier: inspection, reconstruction, evidence with its null, verdict.

Evidence and verdicts import without torch, for those who only read them.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.vetting.nulls import Prior, outliers
from guard.vetting.results import Check, ClassEvidence, Control, Evidence
from guard.vetting.verdict import Outcome, Verdict, judge

if TYPE_CHECKING:
    from guard.vetting.decree import Decree, DecreeSettings, PublishedSettings, collapse, unregularised
    from guard.vetting.examination import BUDGETS, Budget, Effort, FoundTrigger, Vetting, vet
    from guard.vetting.inspection import InspectionSettings, Inspector, clip_inspector
    from guard.vetting.inversion import Effect, Reconstruction, SearchSettings, effect, reconstruct
    from guard.vetting.lead import Lead
    from guard.vetting.reference import SelfControlSettings, self_control

__all__ = [
    "BUDGETS",
    "Budget",
    "Check",
    "ClassEvidence",
    "Control",
    "Decree",
    "DecreeSettings",
    "Effect",
    "Effort",
    "Evidence",
    "FoundTrigger",
    "InspectionSettings",
    "Inspector",
    "Lead",
    "Outcome",
    "Prior",
    "PublishedSettings",
    "Reconstruction",
    "SearchSettings",
    "SelfControlSettings",
    "Verdict",
    "Vetting",
    "clip_inspector",
    "collapse",
    "effect",
    "judge",
    "outliers",
    "reconstruct",
    "self_control",
    "unregularised",
    "vet",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("SelfControlSettings", "self_control"), "reference"),
        **dict.fromkeys(("Decree", "DecreeSettings", "PublishedSettings", "collapse", "unregularised"), "decree"),
        **dict.fromkeys(("BUDGETS", "Budget", "Effort", "FoundTrigger", "Vetting", "vet"), "examination"),
        **dict.fromkeys(("InspectionSettings", "Inspector", "clip_inspector"), "inspection"),
        **dict.fromkeys(("Effect", "Reconstruction", "SearchSettings", "effect", "reconstruct"), "inversion"),
        "Lead": "lead",
    },
)
