"""Fine-tuning that can be interrupted, and whose batches may be larger than what fits into memory."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from guard.classifiers.checkpoints import Checkpoint

Progress = Callable[[str, int, int], None]
Inputs = tuple[Tensor, ...]
_STRIDE = 1_000_003
"""Distance between the seeds of two runs; a prime, so that seeds and steps do not meet."""


@dataclass(frozen=True)
class TuningSettings:
    """How to fine-tune.

    Attributes:
        steps: Optimiser steps.
        batch: Images in each step; all of them if there are fewer.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW, applied to matrices only.
        epsilon: ε of AdamW.
        schedule: Name of the course of the learning rate, a key of `SCHEDULES`.
        forward_batch: Most images in one forward pass. A larger batch is taken apart and gives the same gradient, at
            the price of one more forward pass (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
            Limited Setup", RepL4NLP 2021).
        clip: Largest norm of the gradient; None for no limit.
        update_statistics: Whether batch normalisation uses the statistics of the batch and keeps a running mean of
            them, as in training; with a batch that is taken apart these are statistics of its parts.
        seed: Seed for order and inputs of the batches.
    """

    steps: int
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    epsilon: float = 1e-8
    schedule: Literal["cosine", "falling", "perturb-recover"] = "cosine"
    forward_batch: int = 256
    clip: float | None = 1.0
    update_statistics: bool = False
    seed: int = 0


def falling(done: float) -> float:
    """The peak for the first half, then linearly to zero."""
    return min(1.0, 2 * (1 - done))


def _perturb_recover(done: float) -> float:
    """PAR: from 1 to 0.1 linearly over the first half, from there to 1/30,000 along a cosine (3e-5, 3e-6, 1e-9)."""
    if done < 0.5:
        return 1 - 1.8 * done
    last = 1 / 30_000
    return last + (0.1 - last) * (1 + math.cos(math.pi * (2 * done - 1))) / 2


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: min(1.0, 20 * done + 0.05) * (1 + math.cos(math.pi * done)) / 2,
    "falling": falling,
    "perturb-recover": _perturb_recover,
}
"""The learning rate relative to its peak at each point of the work, from 0 to 1: a short warm-up and half a cosine; the
peak, and in the second half a line to zero; PAR's course."""


class Objective(Protocol):
    """What is minimised."""

    def inputs(self, index: Tensor, generator: torch.Generator) -> Inputs:
        """Return what a step looks at for these images: tensors that are equally long, on the device of the model."""

    def embed(self, inputs: Inputs) -> Inputs:
        """Return the embeddings of a part of the inputs, with a gradient."""

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:
        """Return the loss of a whole step, from the embeddings of all its inputs, at a point of the work in [0, 1)."""


@dataclass(frozen=True)
class Cost:
    """What a fine-tuning cost.

    Attributes:
        steps: Optimiser steps.
        seconds: Wall-clock time, over all runs that it took.
        resumed: The step that the last run began at.
    """

    steps: int
    seconds: float
    resumed: int


def tune(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    objective: Objective,
    count: int,
    settings: TuningSettings,
    *,
    checkpoint: Checkpoint | None = None,
    what: str = "fine-tuning",
    progress: Progress = lambda *_: None,
) -> Cost:
    """Minimise an objective over some parameters of a model, in place.

    Every step draws its randomness from the seed and its own number, so that a run that was killed and begun again
    gives the same weights as one that was not (bit by bit on a CPU). There is no dropout.

    Args:
        model: The model; it is left in evaluation mode.
        parameters: Those of its parameters that are trained.
        objective: What is minimised.
        count: Number of images.
        settings: Steps, rates, schedule and seed.
        checkpoint: Where the training is kept, also when it is finished, for whatever comes next may be interrupted.
        what: Description for `progress`.
        progress: Called with (what, steps done, steps in all).
    """
    # Dropout of any kind stays off: two passes over one part of a batch must agree, and so must two runs.
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and settings.update_statistics:  # noqa: SLF001 - there is no public name for all kinds of it
            module.train()
    for parameter in parameters:
        parameter.requires_grad_()
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        eps=settings.epsilon,
    )
    first, before = checkpoint.restore(model, optimiser) if checkpoint else (0, 0.0)
    started = time.monotonic()
    for step in range(first, settings.steps):
        done = step / settings.steps
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * SCHEDULES[settings.schedule](done)
        index = _batch(count, settings, step)
        inputs = objective.inputs(index, torch.Generator().manual_seed(_STRIDE * settings.seed + step))
        optimiser.zero_grad(set_to_none=True)
        _backward(objective, inputs, done, settings.forward_batch)
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.step()
        if checkpoint:
            seconds = before + time.monotonic() - started
            checkpoint.keep(model, optimiser, step + 1, seconds, last=step + 1 == settings.steps)
        progress(what, step + 1, settings.steps)
    model.eval().requires_grad_(requires_grad=False)
    return Cost(settings.steps, before + time.monotonic() - started, first)


def _batch(count: int, settings: TuningSettings, step: int) -> Tensor:
    """Indices of the images of a step: epoch by epoch without replacement; the rest of an epoch is dropped."""
    size = min(settings.batch, count)
    epoch, place = divmod(step, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_STRIDE * (settings.seed + 1) - epoch - 1))
    return order[place * size : (place + 1) * size]


def _backward(objective: Objective, inputs: Inputs, done: float, forward_batch: int) -> None:
    """Add the gradient of one step to that of the parameters."""
    if len(inputs[0]) <= forward_batch:
        objective.loss(objective.embed(inputs), inputs, done).backward()
        return
    parts = list(zip(*(each.split(forward_batch) for each in inputs), strict=True))
    with torch.no_grad():
        embedded = [objective.embed(part) for part in parts]
    whole = tuple(torch.cat(each).requires_grad_() for each in zip(*embedded, strict=True))
    objective.loss(whole, inputs, done).backward()
    sizes = [len(part[0]) for part in parts]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in whole]
    for part, wanted in zip(parts, zip(*(each.split(sizes) for each in gradients), strict=True), strict=True):
        torch.autograd.backward(objective.embed(part), wanted)
