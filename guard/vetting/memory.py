"""How many images fit into memory at once, with all that a backward pass through an image tower needs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier

_ON_CPU = 2 * 2**30
"""Bytes that the activations of one forward pass may take on a CPU. A fixed number, so that results do not depend on
what else the machine does."""
_OF_FREE = 0.5
"""Share of the free memory of a GPU that they may take there."""


def images_at_once(models: Sequence[Classifier]) -> int:
    """Return how many images can be pushed through several image towers before the backward pass; at least 1.

    One image, of one colour, is pushed through each tower, and what its backward pass would need is counted.

    Args:
        models: On one device. What counts is which of their parameters need a gradient: a layer whose weights are
            trained keeps its input as well.
    """
    needed = sum(_kept(model) for model in models)
    return max(1, _allowed(models[0].device) // max(1, needed))


def _allowed(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_OF_FREE * torch.cuda.mem_get_info(device)[0])
    return _ON_CPU


def _kept(model: Classifier) -> int:
    """Return the bytes that a forward pass of one image keeps for the backward pass, besides the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pixels = torch.full((1, *model.image_shape), 0.5, device=model.device, requires_grad=True)
    with model.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embedding = model.encode_images(pixels)
    del embedding  # until here no storage is freed, and none is counted for another
    return sum(kept.values())
