"""Random batches of images."""

from collections.abc import Iterator

import torch
from torch import Tensor


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices without end, by epochs without replacement; what is left of an epoch is dropped.

    Args:
        count: Number of images, at least 1.
        size: Images in a batch.
        seed: Of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < min(size, count):
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]
