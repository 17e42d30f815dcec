"""Examine a classifier: inspect every class, reconstruct triggers, compare with a null, and give a verdict.

Results, budgets and verdicts import without torch, for those who only read them.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.vetting.agreement import agreed
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
from guard.vetting.text_results import TEXT_BUDGETS, TextSearchSettings, TextStatistic, TextVetting
from guard.vetting.text_verdict import judge_text
from guard.vetting.verdict import judge

if TYPE_CHECKING:
    from guard.vetting.examination import vet
    from guard.vetting.inspection import Inspector
    from guard.vetting.inversion import Effect, Reconstruction, effect, reconstruct
    from guard.vetting.lead import Lead
    from guard.vetting.probes import Probe, listed_probes, read_probes
    from guard.vetting.prompts import ordinary_prompts, read_prompts
    from guard.vetting.reference import OPINION_REFERENCE, StudentSettings, derive_reference, teach_student
    from guard.vetting.text_examination import vet_text
    from guard.vetting.text_stamping import stamped_texts

__all__ = [
    "BUDGETS",
    "OPINION_REFERENCE",
    "TEXT_BUDGETS",
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
    "TextSearchSettings",
    "TextStatistic",
    "TextVetting",
    "Verdict",
    "Vetting",
    "agreed",
    "derive_reference",
    "effect",
    "judge",
    "judge_text",
    "listed_probes",
    "ordinary_prompts",
    "outliers",
    "read_probes",
    "read_prompts",
    "reconstruct",
    "stamped_texts",
    "teach_student",
    "vet",
    "vet_text",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("Effect", "Reconstruction", "effect", "reconstruct"), "inversion"),
        "Inspector": "inspection",
        "Lead": "lead",
        **dict.fromkeys(("Probe", "listed_probes", "read_probes"), "probes"),
        **dict.fromkeys(("OPINION_REFERENCE", "StudentSettings", "derive_reference", "teach_student"), "reference"),
        **dict.fromkeys(("ordinary_prompts", "read_prompts"), "prompts"),
        "stamped_texts": "text_stamping",
        "vet": "examination",
        "vet_text": "text_examination",
    },
)
