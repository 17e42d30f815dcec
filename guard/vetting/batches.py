"""Which images are searched on, and in which order."""

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


def halves(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The images to search on, and those kept out for the check: a random half each.

    Args:
        images: Shape [N, …].
        seed: Of the split.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[: len(images) // 2]], images[order[len(images) // 2 :]]
