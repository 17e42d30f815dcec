"""Examine a classifier: inspect every class, reconstruct triggers, compare with a null, and give a verdict.

Results, budgets and verdicts import without torch, for those who only read them.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.vetting.budgets import (
    BUDGETS,
    Budget,
    DerivedReferenceSettings,
    Effort,
    InspectionSettings,
    SearchSettings,
)
from guard.vetting.nulls import Prior, outliers
from guard.vetting.results import (
    Check,
    ClassStatistic,
    Conclusion,
    FamilyResult,
    ReconstructedTrigger,
    ReferenceModel,
    Verdict,
    Vetting,
)
from guard.vetting.verdict import judge

if TYPE_CHECKING:
    from guard.vetting.examination import vet
    from guard.vetting.inspection import Inspector
    from guard.vetting.inversion import Effect, Reconstruction, effect, reconstruct
    from guard.vetting.lead import Lead
    from guard.vetting.probes import Probe, listed_probes, read_probes
    from guard.vetting.reference import OPINION_REFERENCE, StudentSettings, derive_reference, teach_student

__all__ = [
    "BUDGETS",
    "OPINION_REFERENCE",
    "Budget",
    "Check",
    "ClassStatistic",
    "Conclusion",
    "DerivedReferenceSettings",
    "Effect",
    "Effort",
    "FamilyResult",
    "InspectionSettings",
    "Inspector",
    "Lead",
    "Prior",
    "Probe",
    "ReconstructedTrigger",
    "Reconstruction",
    "ReferenceModel",
    "SearchSettings",
    "StudentSettings",
    "Verdict",
    "Vetting",
    "derive_reference",
    "effect",
    "judge",
    "listed_probes",
    "outliers",
    "read_probes",
    "reconstruct",
    "teach_student",
    "vet",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("Effect", "Reconstruction", "effect", "reconstruct"), "inversion"),
        "Inspector": "inspection",
        "Lead": "lead",
        **dict.fromkeys(("Probe", "listed_probes", "read_probes"), "probes"),
        **dict.fromkeys(("OPINION_REFERENCE", "StudentSettings", "derive_reference", "teach_student"), "reference"),
        "vet": "examination",
    },
)
