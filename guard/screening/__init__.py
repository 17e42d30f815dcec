"""Score requests and decide, at a false-alarm rate that the operator chose. numpy only: no torch, no gRPC."""

from guard.screening.conformal import Threshold, threshold
from guard.screening.neighbours import Neighbours
from guard.screening.screen import MAX_K, Scores, Screen, default_k

__all__ = ["MAX_K", "Neighbours", "Scores", "Screen", "Threshold", "default_k", "threshold"]
