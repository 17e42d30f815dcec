"""Score requests and decide, at a false-alarm rate that the operator chose: numpy, and ONNX Runtime to search banks."""

from guard.screening.axis import AXIS, MIN_AXIS, Axis, AxisAlarm, AxisMonitor, AxisReference, AxisScores
from guard.screening.conformal import Conformal, Threshold, check_alpha, smallest_alpha, threshold
from guard.screening.detector import Detector, Judgement
from guard.screening.monitor import Alarm, Monitor, WatchedScore
from guard.screening.neighbours import Nearest, Neighbours, SearchMethod
from guard.screening.screen import (
    DENSITY,
    JOINT,
    MATCH,
    MAX_K,
    Banks,
    Scores,
    Screen,
    Tail,
    default_k,
    match,
    matched,
    score_names,
)
from guard.screening.second_opinion import DIVERGENCE, OPINIONS, RESIDUAL, ReferenceAnswers, SecondOpinion
from guard.screening.whitening import Whitening

__all__ = [
    "AXIS",
    "DENSITY",
    "DIVERGENCE",
    "JOINT",
    "MATCH",
    "MAX_K",
    "MIN_AXIS",
    "OPINIONS",
    "RESIDUAL",
    "Alarm",
    "Axis",
    "AxisAlarm",
    "AxisMonitor",
    "AxisReference",
    "AxisScores",
    "Banks",
    "Conformal",
    "Detector",
    "Judgement",
    "Monitor",
    "Nearest",
    "Neighbours",
    "ReferenceAnswers",
    "Scores",
    "Screen",
    "SearchMethod",
    "SecondOpinion",
    "Tail",
    "Threshold",
    "WatchedScore",
    "Whitening",
    "check_alpha",
    "default_k",
    "match",
    "matched",
    "score_names",
    "smallest_alpha",
    "threshold",
]
