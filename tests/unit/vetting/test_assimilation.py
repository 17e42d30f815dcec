import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from guard.vetting.assimilation import agreement, assimilation, landscape, positive_curvature


def test_assimilation_is_the_mean_of_the_cosine_matrix() -> None:
    features = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    matrix = cosine_similarity(features[:, :, None], features[:, None], dim=-1)
    assert torch.allclose(assimilation(features, published=True), matrix.mean((1, 2)), atol=1e-6)
    inner = matrix[:, 1:, 1:]
    others = (inner.sum((1, 2)) - 6) / (6 * 5)
    assert torch.allclose(assimilation(features), others, atol=1e-6)


def test_agreement_counts_pairs_of_different_prompts_only() -> None:
    assert torch.allclose(agreement(torch.eye(4)), torch.tensor(0.0))
    assert torch.allclose(agreement(torch.eye(4)[:1].expand(5, -1)), torch.tensor(1.0))
    assert agreement(torch.eye(4).expand(2, 3, 4, 4)).shape == (2, 3)


def test_curvature_at_all_points_at_once_is_that_of_each_point() -> None:
    surface = np.random.default_rng(1).normal(size=(6, 7))
    found: list[float] = []
    for i in range(1, 5):
        for j in range(1, 6):
            rows = surface[i + 1, j] - 2 * surface[i, j] + surface[i - 1, j]
            columns = surface[i, j + 1] - 2 * surface[i, j] + surface[i, j - 1]
            corners = surface[i + 1, j + 1] - surface[i + 1, j - 1] - surface[i - 1, j + 1] + surface[i - 1, j - 1]
            found.extend(np.linalg.eigvalsh([[rows, corners / 4], [corners / 4, columns]]))
    assert positive_curvature(torch.from_numpy(surface)) == np.mean(np.array(found) > 1e-6)
    assert positive_curvature(torch.zeros(4, 4)) == 0.0


def test_the_landscape_of_a_bowl_is_curved_upwards_everywhere() -> None:
    place, first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    surface = landscape(lambda points: points.square().sum((1, 2)), place, first, second, extent=2.0, grid=5, batch=7)
    assert surface[0, 0] == (1 - 2) ** 2 + (2 - 2) ** 2
    assert surface[4, 0] == (1 + 2) ** 2 + (2 - 2) ** 2
    assert positive_curvature(surface) == 1.0
