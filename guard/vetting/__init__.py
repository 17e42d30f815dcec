"""Examine a classifier: inversion, evidence with its null, verdict.

Evidence and verdicts import without torch, for those who only read them.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.vetting.evidence import ClassEvidence, Evidence, outliers
from guard.vetting.verdict import Outcome, Verdict, judge

if TYPE_CHECKING:
    from guard.vetting.examination import BUDGETS, Budget, FoundTrigger, Vetting, vet
    from guard.vetting.inversion import Effect, Reconstruction, SearchSettings, effect, margin, reconstruct

__all__ = [
    "BUDGETS",
    "Budget",
    "ClassEvidence",
    "Effect",
    "Evidence",
    "FoundTrigger",
    "Outcome",
    "Reconstruction",
    "SearchSettings",
    "Verdict",
    "Vetting",
    "effect",
    "judge",
    "margin",
    "outliers",
    "reconstruct",
    "vet",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("Effect", "Reconstruction", "SearchSettings", "effect", "margin", "reconstruct"), "inversion"),
        **dict.fromkeys(("BUDGETS", "Budget", "FoundTrigger", "Vetting", "vet"), "examination"),
    },
)
