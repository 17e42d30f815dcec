"""How alike the features of tokens, and of prompts, become when something is put among the tokens.

*Assimilation* is AMDET's word (Wang et al., arXiv 2512.00343, section 3): where attention concentrates on a trigger,
the features of all tokens of a prompt grow alike. *Agreement* is the same of the embeddings of many prompts, which is
all that a CLIP classifier reads of a text: an attacker who leaves the other tokens alone avoids assimilation, but not
that all prompts with the trigger mean the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

_MIN_CURVATURE = 1e-6


def assimilation(features: Tensor, *, published: bool = False) -> Tensor:
    """The mean cosine between the features of the tokens of a prompt, for each prompt: shape [N].

    Args:
        features: Shape [N, L, W].
        published: Whether to count the first token and each token's cosine with itself, as AMDET's released code does.
            The first token of a causal tower sees no other, and the diagonal adds about 1/L whatever the prompt.
    """
    unit = normalize(features if published else features[:, 1:], dim=-1)
    length = unit.shape[1]
    # The sum of all entries of the cosine matrix is the squared length of the sum of the unit vectors.
    total = unit.sum(1).square().sum(-1)
    return total / length**2 if published else (total - length) / (length * (length - 1))


def agreement(embeddings: Tensor) -> Tensor:
    """The mean cosine between the embeddings of different prompts.

    Args:
        embeddings: L2-normalised, shape [..., N, D], N at least 2.

    Returns:
        Shape [...].
    """
    count = embeddings.shape[-2]
    return (embeddings.sum(-2).square().sum(-1) - count) / (count * (count - 1))


def landscape(
    loss: Callable[[Tensor], Tensor],
    place: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    extent: float,
    grid: int,
    batch: int,
) -> Tensor:
    """The values of a loss on a square grid around a place, along two directions: shape [grid, grid].

    Args:
        loss: A function from points, shape [B, ...], to losses, shape [B].
        place: The centre, of any shape.
        first: Direction of the rows, of the shape of `place`.
        second: Direction of the columns.
        extent: Half the side of the square, in units of the directions.
        grid: Points on a side.
        batch: Points in one call of `loss`.
    """
    # AMDET's released code makes the steps with numpy, in double precision.
    steps = torch.linspace(-extent, extent, grid, dtype=torch.float64).to(place)
    shape = (-1, *[1] * place.dim())
    moves = torch.cartesian_prod(steps, steps)
    points = place + moves[:, 0].view(shape) * first + moves[:, 1].view(shape) * second
    with torch.no_grad():
        return torch.cat([loss(part) for part in points.split(batch)]).view(grid, grid)


def positive_curvature(surface: Tensor) -> float:
    """The share of eigenvalues above 1e-6 among those of the Hessians at all inner points of a surface, in [0, 1].

    The Hessians are finite differences with unit steps (AMDET's fourth test), computed for all points at once. Points
    at which the surface is exactly flat are left out, as they are there.

    Args:
        surface: Shape [H, W], both at least 3.
    """
    values = surface.double()
    centre = values[1:-1, 1:-1]
    rows = values[2:, 1:-1] - 2 * centre + values[:-2, 1:-1]
    columns = values[1:-1, 2:] - 2 * centre + values[1:-1, :-2]
    mixed = (values[2:, 2:] - values[2:, :-2] - values[:-2, 2:] + values[:-2, :-2]) / 4
    bent = (rows != 0) | (columns != 0) | (mixed != 0)
    if not bent.any():
        return 0.0
    middle, spread = (rows + columns) / 2, (((rows - columns) / 2).square() + mixed.square()).sqrt()
    eigenvalues = torch.stack([middle - spread, middle + spread])[:, bent]
    return float((eigenvalues > _MIN_CURVATURE).double().mean())
