"""Run methods over a zoo of models, and report true and false positives and the cost.

Statistics, zoos and results import without torch.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.evaluation.cliptrace import Prediction, Score, check_submission, score, write_submission
from guard.evaluation.results import Detection, Features, Result, Screening, Store
from guard.evaluation.statistics import Auroc, Rate, auroc
from guard.evaluation.summary import Summary, predictions, summarise
from guard.evaluation.zoo import Truth, Zoo

if TYPE_CHECKING:
    from guard.evaluation.methods import METHODS, Method
    from guard.evaluation.running import Evaluation, Failure, evaluate
    from guard.evaluation.subject import EvaluationSettings, Subject
    from guard.evaluation.writing import write_predictions, write_summary

__all__ = [
    "METHODS",
    "Auroc",
    "Detection",
    "Evaluation",
    "EvaluationSettings",
    "Failure",
    "Features",
    "Method",
    "Prediction",
    "Rate",
    "Result",
    "Score",
    "Screening",
    "Store",
    "Subject",
    "Summary",
    "Truth",
    "Zoo",
    "auroc",
    "check_submission",
    "evaluate",
    "predictions",
    "score",
    "summarise",
    "write_predictions",
    "write_submission",
    "write_summary",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("METHODS", "Method"), "methods"),
        **dict.fromkeys(("Evaluation", "Failure", "evaluate"), "running"),
        **dict.fromkeys(("EvaluationSettings", "Subject"), "subject"),
        **dict.fromkeys(("write_predictions", "write_summary"), "writing"),
    },
)
