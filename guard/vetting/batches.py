"""The split of the images, and the order in which searches see them."""

from collections.abc import Iterator

import torch
from torch import Tensor


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of indices without end, epoch by epoch without replacement; the rest of an epoch is dropped.

    Args:
        count: Number of images, at least 1.
        size: Images in a batch.
        seed: Seed for the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < min(size, count):
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]


def halves(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split the images into those to search on and those held out for the checks: a random half each.

    Args:
        images: Shape [N, …].
        seed: Seed for the split.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[: len(images) // 2]], images[order[len(images) // 2 :]]
