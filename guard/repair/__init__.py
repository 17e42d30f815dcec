"""Remove a backdoor from a classifier, and prove it: every repair ends with a new vetting."""

from guard.classifiers.tuning import TuningSettings
from guard.repair.cases import Candidate, Case, Images, Method, TargetedTrigger
from guard.repair.guided import Guided
from guard.repair.measuring import Drift, Measured, drift, measure
from guard.repair.pairs import read_pairs
from guard.repair.perturb_recover import PerturbRecover
from guard.repair.realign import Realign
from guard.repair.repairing import METHODS, Outcome, Repair, Repaired, repair
from guard.repair.subtract import Subtract
from guard.repair.switch import Switch
from guard.repair.writing import check_place, revoked_digests, summary, write

__all__ = [
    "METHODS",
    "Candidate",
    "Case",
    "Drift",
    "Guided",
    "Images",
    "Measured",
    "Method",
    "Outcome",
    "PerturbRecover",
    "Realign",
    "Repair",
    "Repaired",
    "Subtract",
    "Switch",
    "TargetedTrigger",
    "TuningSettings",
    "check_place",
    "drift",
    "measure",
    "read_pairs",
    "repair",
    "revoked_digests",
    "summary",
    "write",
]
