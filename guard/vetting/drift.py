"""What a text tower has come to say of ordinary prompts, compared with its reference model: drift without any trigger.

Backdoors of encoders are low-rank deformations around the target, and leave a drift of clean prompts towards it (SEMAD,
arXiv 2602.20193, from its abstract). The statistic here is a construction of guard's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Drift:
    """The drift f(t) − f_ref(t) of the embeddings of prompts.

    Attributes:
        size: Mean length of the drift.
        concentration: Share of its squared length that lies along one direction, in [1/D, 1].
        direction: That direction, which leads to the target of a backdoor or away from it: unit vector, shape [D].
    """

    size: float
    concentration: float
    direction: Tensor


def drift(embeddings: Tensor, reference: Tensor) -> Drift:
    """Measure the drift.

    Args:
        embeddings: Of prompts on the suspect: unit vectors, shape [N, D].
        reference: Of the same prompts on the reference model, which has the same D.
    """
    change = (embeddings - reference).double()
    _, values, directions = torch.linalg.svd(change, full_matrices=False)
    energy = values.square()
    share = float(energy[0] / energy.sum().clamp(min=1e-12))
    return Drift(float(change.norm(dim=-1).mean()), share, directions[0].float())
