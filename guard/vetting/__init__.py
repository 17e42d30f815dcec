"""Examine a classifier: inspection, reconstruction, evidence with its null, verdict.

FamilyResult and verdicts import without torch, for those who only read them.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.vetting.nulls import Prior, outliers
from guard.vetting.results import Check, ClassStatistic, FamilyResult, ReferenceModel
from guard.vetting.verdict import Conclusion, Verdict, judge

if TYPE_CHECKING:
    from guard.vetting.decree import Decree, DecreeSettings, PublishedSettings, collapse, unregularised
    from guard.vetting.examination import BUDGETS, Budget, Effort, ReconstructedTrigger, Vetting, vet
    from guard.vetting.inspection import InspectionSettings, Inspector, clip_inspector
    from guard.vetting.inversion import Effect, Reconstruction, SearchSettings, effect, reconstruct
    from guard.vetting.lead import Lead
    from guard.vetting.reference import DerivedReferenceSettings, derive_reference

__all__ = [
    "BUDGETS",
    "Budget",
    "Check",
    "ClassStatistic",
    "Conclusion",
    "Decree",
    "DecreeSettings",
    "DerivedReferenceSettings",
    "Effect",
    "Effort",
    "FamilyResult",
    "InspectionSettings",
    "Inspector",
    "Lead",
    "Prior",
    "PublishedSettings",
    "ReconstructedTrigger",
    "Reconstruction",
    "ReferenceModel",
    "SearchSettings",
    "Verdict",
    "Vetting",
    "clip_inspector",
    "collapse",
    "derive_reference",
    "effect",
    "judge",
    "outliers",
    "reconstruct",
    "unregularised",
    "vet",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("DerivedReferenceSettings", "derive_reference"), "reference"),
        **dict.fromkeys(("Decree", "DecreeSettings", "PublishedSettings", "collapse", "unregularised"), "decree"),
        **dict.fromkeys(("BUDGETS", "Budget", "Effort", "ReconstructedTrigger", "Vetting", "vet"), "examination"),
        **dict.fromkeys(("InspectionSettings", "Inspector", "clip_inspector"), "inspection"),
        **dict.fromkeys(("Effect", "Reconstruction", "SearchSettings", "effect", "reconstruct"), "inversion"),
        "Lead": "lead",
    },
)
