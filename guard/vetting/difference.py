"""Does the difference of the suspect and its base look like noise?

Fine-tuning changes weights along few directions: the largest singular value of a weight matrix's difference is several
times that of independent noise of the same size. Whoever wants to hide what was changed may add such noise to all
weights. Then nothing can be said of how the model was changed, and no search that fails proves much.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier

NOISE_LIKE = 1.3
"""Largest singular value of the difference, relative to that of noise of the same size, up to which it counts as noise.
Independent noise has about 1, and of 75 fine-tuned models of the zoo `small` of seed 20, attacked or not, none has less
than 2.1."""
NOTABLE = 0.02
"""Size of the difference, relative to the base's weights, below which it is no subject: rounding to 8 bits makes one of
about 0.01, which looks like noise too."""
_ITERATIONS = 30


@dataclass(frozen=True)
class Difference:
    """How the weight matrices of two image towers differ.

    Attributes:
        size: Norm of the difference relative to that of the base's weights, over all matrices; at least 0.
        structure: Largest singular value of a matrix's difference, relative to what independent noise of the same size
            would have (√m + √n times its standard deviation), averaged over the matrices with the weight of their
            squared norms; about 1 for noise. 0 where nothing differs.
    """

    size: float
    structure: float

    @property
    def is_noise(self) -> bool:
        """Whether the difference is notable and looks like independent noise."""
        return self.size >= NOTABLE and self.structure <= NOISE_LIKE


@torch.no_grad()
def difference(suspect: Classifier, base: Classifier) -> Difference | None:
    """Compare the image towers of two models, matrix by matrix; None if they are not of the same architecture."""
    own, others = (
        {name: weight for name, weight in model.model.visual.named_parameters() if weight.dim() > 1}
        for model in (suspect, base)
    )
    if {name: weight.shape for name, weight in own.items()} != {name: weight.shape for name, weight in others.items()}:
        return None
    total = energy = weighted = 0.0
    for name, weight in own.items():
        before = others[name].to(weight.device).flatten(1).float()
        changed = weight.flatten(1).float() - before
        squares = float(changed.square().sum())
        total, energy = total + float(before.square().sum()), energy + squares
        if squares:
            rows, columns = changed.shape
            noise = (squares / (rows * columns)) ** 0.5 * (rows**0.5 + columns**0.5)
            weighted += squares * _largest(changed) / noise
    if not total:
        return None
    return Difference((energy / total) ** 0.5, weighted / energy if energy else 0.0)


def _largest(matrix: Tensor) -> float:
    """The largest singular value, by power iteration: close enough, and much faster than all of them."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator).to(matrix)
    for _ in range(_ITERATIONS):
        vector = torch.nn.functional.normalize(matrix.T @ (matrix @ vector), dim=0)
    return float((matrix @ vector).norm())
