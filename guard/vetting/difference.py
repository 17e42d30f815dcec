"""Does the difference of the suspect and its base look like noise?

Fine-tuning changes weights along few directions: most singular values of a weight matrix's difference are much smaller
than those of independent noise of the same size. Whoever wants to hide what was changed may add such noise to all
weights. Then nothing can be said of how the model was changed, and no search that fails proves much. The median
singular value tells the two apart, and not the largest, which one direction of a hundredth of the noise's energy raises
at will. It is measured after rows and columns were brought to one length, and of the longer half of both: noise may be
stronger in some than in others.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.vetting.results import Difference

_NARROW = 8
"""Smaller side below which a matrix has too few singular values to tell."""
_POINTS = 4096


@torch.no_grad()
def difference(suspect: Classifier, base: Classifier) -> Difference | None:
    """Compare the image towers of two models, matrix by matrix; None if they are not of the same architecture."""
    own, others = (
        {name: weight for name, weight in model.model.visual.named_parameters() if weight.dim() > 1}
        for model in (suspect, base)
    )
    if {name: weight.shape for name, weight in own.items()} != {name: weight.shape for name, weight in others.items()}:
        return None
    total = energy = told = weighted = 0.0
    for name, weight in own.items():
        before = others[name].to(weight.device).flatten(1).float()
        changed = weight.flatten(1).float() - before
        squares = float(changed.square().sum())
        total, energy = total + float(before.square().sum()), energy + squares
        if squares and min(changed.shape) >= _NARROW:
            told, weighted = told + squares, weighted + squares * _median(_evened(changed))
    if not total:
        return None
    return Difference((energy / total) ** 0.5, weighted / told if told else 0.0)


def _evened(matrix: Tensor) -> Tensor:
    """The longer half of the rows and of the columns, brought to about one length."""
    for side in (1, 0):
        lengths = matrix.norm(dim=side)
        chosen = lengths.argsort(descending=True)[: len(lengths) // 2]
        matrix = matrix.index_select(1 - side, chosen)
    for side in (1, 0) * 2:
        matrix = torch.nn.functional.normalize(matrix, dim=side)
    return matrix


def _median(matrix: Tensor) -> float:
    """The median singular value, relative to what noise of the same norm and shape would have."""
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh((rows @ rows.T).double()).clamp(min=0).sqrt()
    return float(values.quantile(0.5) / matrix.norm()) / _median_of_noise(*rows.shape)


@cache
def _median_of_noise(rows: int, columns: int) -> float:
    """The median singular value of independent noise with a norm of 1, by the law of Marchenko and Pastur (1967).

    Args:
        rows: Number of rows, at most that of columns.
        columns: Number of columns.
    """
    ratio = rows / columns
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    # Squared singular values of unit variance, per column; the substitution keeps the density finite at the ends.
    angle = (np.arange(_POINTS) + 0.5) * np.pi / _POINTS
    places = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    mass = np.cumsum(np.sin(angle) ** 2 / places)
    median = float(places[np.searchsorted(mass, mass[-1] / 2)])
    return math.sqrt(median / rows)
