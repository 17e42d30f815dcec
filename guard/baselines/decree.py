"""DECREE: the smallest patch under which all images look alike to an encoder. It needs neither classes nor labels.

Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023, and its released code. A backdoored image tower
sends every image that carries the trigger to one point, so that a small patch is enough to collapse its embeddings.
How small it is on a clean encoder differs by a factor of twenty from one encoder to the next, so neither statistic here
has an absolute threshold. Compare them with those of the checkpoint that the model was tuned from, or with those of
clean models of its kind.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.baselines.released_decree import PublishedSettings, SearchedPatch, search_as_published
from guard.classifiers.classifier import ENCODE_BATCH, Classifier
from guard.errors import ImageError, UsageError
from guard.triggers import Patch
from guard.vetting.batches import batches

_BETAS = (0.0, 0.8)
"""Betas of Adam. The loss changes its direction with every success, so that momentum only overshoots."""
_PATTERN_RATE = 2.0
"""Learning rate of the pattern, relative to that of the mask: the pattern must settle before the mask can shrink."""
_LAST_RATE = 0.2
"""Learning rate at the end of a search, relative to that at its start."""
_GAIN = 0.95
"""A success is checked if its norm is at most this share of the smallest so far; each check costs as much as several
steps."""
_HALVINGS = 7
"""Steps of the bisection that clears the faintest pixels."""


@dataclass(frozen=True)
class DecreeSettings:
    """How much work the default search does.

    The weight of the norm follows the similarity at every step, by a factor and not by an amount, since it passes
    through several powers of ten. A smaller norm counts only if the patch still reaches `success` on `check` images;
    the smallest of a long search would otherwise be that of the luckiest batch. In the end the faintest pixels are
    cleared, as many as `success` allows.

    Attributes:
        steps: Largest number of optimiser steps.
        batch: Images in each step.
        learning_rate: Learning rate of Adam on the unconstrained mask; it falls along a cosine. That of the pattern is
            twice as large.
        success: Mean pairwise cosine that the patch must reach, in (−1, 1).
        check: Images on which a candidate for the smallest norm must reach it.
        weight: Initial weight of the norm: loss per unit of the mask's mean.
        factor: Factor by which the weight grows after a step that reached `success`, and shrinks after one that did
            not.
        stall: Number of steps without an improvement of the smallest norm after which the search ends.
        seed: Seed for the start of the search and for the batches.
    """

    steps: int = 70
    batch: int = 12
    learning_rate: float = 0.7
    success: float = 0.99
    check: int = 64
    weight: float = 1.0
    factor: float = 1.1
    stall: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Decree:
    """The result of a search.

    Attributes:
        trigger: The smallest patch that reached the similarity; the last one tried where none did.
        l1: Its norm, in pixels: the sum of the mask. The norm in the paper counts each pixel three times.
        pl1: The norm as a share of the image, in [0, 1]; the paper's PL1.
        reached: Whether the similarity was reached. Where it was not, the norm is meaningless.
        similarity: Mean pairwise cosine under the trigger on the images searched on.
        held_out_similarity: The same on images kept out of the search.
        resemblance: Mean cosine between the embedding of a held-out image with and without the trigger.
        feature: The target feature: normalised mean embedding of the held-out images under the trigger, shape [D].
        steps: Optimiser steps made.
        passes: Number of images pushed through the image tower to find and check the patch.
    """

    trigger: Patch
    l1: float
    pl1: float
    reached: bool
    similarity: float
    held_out_similarity: float
    resemblance: float
    feature: Tensor
    steps: int
    passes: int


def collapse(
    encoder: Classifier,
    images: Tensor,
    held_out: Tensor,
    settings: DecreeSettings | PublishedSettings,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Decree:
    """Search for the smallest patch that makes all embeddings alike.

    The search minimises −S + λ · ‖mask‖₁ over mask and pattern, where S is the mean cosine over pairs of different
    images of a batch and λ follows success.

    Args:
        encoder: The suspect; only its image tower is used.
        images: uint8, shape [N, 3, H, W] at the encoder's resolution: images to search on.
        held_out: uint8, shape [M, 3, H, W]: images to check on.
        settings: How much work to do; `PublishedSettings` select the search of the released code.
        progress: Called with (steps done, largest number of steps).

    Raises:
        ImageError: There are fewer than two images of either kind, or they are of another size.
        UsageError: A setting is out of range.
    """
    _check_images(encoder, images, held_out)
    _check_settings(settings)
    if isinstance(settings, PublishedSettings):
        found = search_as_published(encoder, images, settings, progress)
    else:
        found = _search(encoder, images, settings, progress, regularised=True)
    return _measured(encoder, images, held_out, found)


def unregularised(
    encoder: Classifier,
    images: Tensor,
    held_out: Tensor,
    settings: DecreeSettings,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Decree:
    """Collapse the embeddings with no regard to the norm, and measure how far they had to move: the second statistic.

    The statistic is the result's `resemblance`. On the first way that the optimiser finds to a mean cosine of `success`
    the embeddings of a backdoored encoder should have to move less, so that the statistic should be higher. It comes
    from an unpublished variant of the released code with a uniformly random start; here the start is DECREE's own,
    which makes no difference. On our small models its difference from that of the base model told clean from backdoored
    models little better than chance: report it, but do not judge by it alone.

    Args:
        encoder: As for `collapse`.
        images: As for `collapse`.
        held_out: As for `collapse`.
        settings: How much work to do; the settings of the norm have no effect.
        progress: Called with (steps done, largest number of steps).

    Raises:
        ImageError: As for `collapse`.
        UsageError: As for `collapse`.
    """
    _check_images(encoder, images, held_out)
    _check_settings(settings)
    found = _search(encoder, images, settings, progress, regularised=False)
    return _measured(encoder, images, held_out, found)


def _check_images(encoder: Classifier, images: Tensor, held_out: Tensor) -> None:
    for what, pixels in (("search on", images), ("check on", held_out)):
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != encoder.image_shape or pixels.dtype != torch.uint8:
            shape = "×".join(map(str, encoder.image_shape))
            raise ImageError(
                f"the images to {what} must be uint8 of shape N×{shape}, "
                f"but they are {pixels.dtype} of shape {'×'.join(map(str, pixels.shape))}"
            )
        if len(pixels) < 2:
            raise ImageError(f"pairwise cosines need at least 2 images to {what}, but there are {len(pixels)}")


def _check_settings(settings: DecreeSettings | PublishedSettings) -> None:
    if settings.batch < 2:
        raise UsageError(f"pairwise cosines need batches of at least 2 images, but the batch is {settings.batch}")
    if not -1 < settings.success < 1:
        raise UsageError(f"the similarity to reach must lie between -1 and 1, but it is {settings.success}")
    if settings.factor <= 1:
        raise UsageError(f"the factor of the weight must be larger than 1, but it is {settings.factor}")
    if (settings.epochs if isinstance(settings, PublishedSettings) else settings.steps) < 1 or settings.stall < 1:
        raise UsageError("a search needs at least one step, and at least one before it may count as stalled")
    if isinstance(settings, DecreeSettings) and settings.check < 2:
        raise UsageError(f"pairwise cosines need at least 2 images to check on, but the settings have {settings.check}")


def _measured(encoder: Classifier, images: Tensor, held_out: Tensor, found: SearchedPatch) -> Decree:
    """Measure a patch as it is after rounding to bytes, under the encoder's own normalisation."""
    patch = found.patch
    stamped = encoder.embed(patch.stamp(held_out))
    return Decree(
        patch,
        float(patch.mask.sum()),
        float(patch.mask.mean()),
        found.reached,
        float(_similarity(encoder.embed(patch.stamp(images)))),
        float(_similarity(stamped)),
        float((stamped * encoder.embed(held_out)).sum(-1).mean()),
        normalize(stamped.mean(0), dim=0),
        found.steps,
        found.passes + len(images) + 2 * len(held_out),
    )


def _search(
    encoder: Classifier,
    images: Tensor,
    settings: DecreeSettings,
    progress: Callable[[int, int], None],
    *,
    regularised: bool,
) -> SearchedPatch:
    """Run one search; without the norm in the loss it ends at the first success."""
    device = encoder.device
    raw = Patch.start(1, encoder.image_shape, torch.Generator(device).manual_seed(settings.seed))
    rates = {"mask": settings.learning_rate, "pattern": _PATTERN_RATE * settings.learning_rate}
    groups = [{"params": [raw[name].requires_grad_()], "lr": rate} for name, rate in rates.items()]
    optimiser = torch.optim.Adam(groups, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _decay(step / settings.steps))
    generator = torch.Generator().manual_seed(settings.seed)
    check = images[torch.randperm(len(images), generator=generator)[: settings.check]]
    weight = settings.weight if regularised else 0.0
    best, smallest, improved, step, passes = None, float("inf"), 0, 0, 0
    stream = batches(len(images), settings.batch, settings.seed)
    for step, index in zip(range(1, settings.steps + 1), stream, strict=False):
        patch = Patch.constrain(raw)[0]
        similarity = _similarity_under(encoder, patch, images[index])
        size = patch.mask.mean()
        optimiser.zero_grad(set_to_none=True)
        (weight * size - similarity).backward()
        optimiser.step()
        schedule.step()
        reached, norm = torch.stack([similarity.detach(), size.detach()]).tolist()
        passes += len(index)
        success = reached >= settings.success
        if success and norm <= _GAIN * smallest:
            passes += len(check)
            success = _is_enough(encoder, patch, check, settings)
            if success:
                best, smallest, improved = Patch(patch.mask.detach(), patch.pattern.detach()), norm, step
        weight *= settings.factor if success else 1 / settings.factor
        progress(step, settings.steps)
        if best is not None and (not regularised or step - improved >= settings.stall):
            break
    if best is None:
        return SearchedPatch(Patch.constrain(raw)[0].detach(), reached=False, steps=step, passes=passes)
    if regularised:
        best, passes = _cleared(encoder, best, check, settings), passes + _HALVINGS * len(check)
    return SearchedPatch(best.detach(), reached=True, steps=step, passes=passes)


def _decay(done: float) -> float:
    """Return the learning rate after a share of the steps, relative to that at the start."""
    return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _cleared(encoder: Classifier, patch: Patch, check: Tensor, settings: DecreeSettings) -> Patch:
    """Return the patch without its faintest pixels: those below a value of the mask that bisection finds."""
    best, low, high = patch, 0.0, 0.5
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        candidate = Patch(patch.mask * (patch.mask >= middle), patch.pattern)
        if _is_enough(encoder, candidate, check, settings):
            best, low = candidate, middle
        else:
            high = middle
    return best


@torch.no_grad()
def _is_enough(encoder: Classifier, patch: Patch, check: Tensor, settings: DecreeSettings) -> bool:
    """Whether a patch reaches the similarity on the check images."""
    return float(_similarity_under(encoder, patch, check)) >= settings.success


def _similarity_under(encoder: Classifier, patch: Patch, images: Tensor) -> Tensor:
    """Return the mean pairwise cosine of uint8 images with a patch on them; differentiable in the patch."""
    with encoder.autocast():
        parts = [
            encoder.encode_images(patch.apply(part.to(encoder.device).float() / 255))
            for part in images.split(ENCODE_BATCH)
        ]
    return _similarity(torch.cat(parts))


def _similarity(embeddings: Tensor) -> Tensor:
    """Return the mean cosine over pairs of different rows of unit vectors, shape [B, D]."""
    count = len(embeddings)
    return (embeddings.sum(0).square().sum() - embeddings.square().sum()) / (count * (count - 1))
