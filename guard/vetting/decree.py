"""DECREE: the smallest patch under which all images of an encoder look alike; no classes and no labels needed.

Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023, and its released code. A backdoored image tower
sends every image that carries the trigger to one point, so that a patch which collapses its embeddings can be small.
How small it is on a clean encoder differs by a factor of twenty from one encoder to the next; neither statistic here
has an absolute threshold. Compare them with those of the checkpoint that the model was tuned from, or of clean models
of its kind.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.classifier import ENCODE_BATCH, Classifier
from guard.errors import ImageError, UsageError
from guard.triggers import Patch
from guard.vetting.batches import batches

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PUBLISHED_BETAS = (0.5, 0.9)
_EPSILON = 1e-7
_BETAS = (0.0, 0.8)
"""Adam's. The loss changes its direction with every success, so that momentum only overshoots."""
_PATTERN_RATE = 2.0
"""Learning rate of the pattern, relative to the mask's: what is drawn must settle before what is covered can shrink."""
_LAST_RATE = 0.2
"""Learning rate at the end of a search, relative to that at its start."""
_GAIN = 0.95
"""A success is checked if its norm is at most this share of the smallest so far; each check costs several steps."""
_HALVINGS = 7


@dataclass(frozen=True)
class DecreeSettings:
    """How hard to search.

    The weight of the norm follows the similarity at every step, by a factor and not by an amount, since it passes
    through several powers of ten. A smaller norm counts only if the patch still reaches `success` on `check` images;
    the smallest of a long search would otherwise be that of the luckiest batch. In the end the faintest pixels are
    cleared, as many as `success` allows.

    Attributes:
        steps: Most optimiser steps.
        batch: Images in each step.
        learning_rate: Adam's, on the unconstrained mask; it falls along a cosine. The pattern's is twice as large.
        success: Mean pairwise cosine that the patch must reach, in (−1, 1).
        check: Images on which a candidate for the smallest norm must reach it.
        weight: Where the weight of the norm starts: loss per unit of the mask's mean.
        factor: By which the weight grows after a step that reached `success`, and shrinks after one that did not.
        stall: The search is over when the smallest norm has not improved in this many steps.
        seed: Of the start and the batches.
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
class PublishedSettings:
    """The released code's search, with its constants for CLIP and ImageNet encoders.

    It normalises every encoder's input as ImageNet's, takes each norm from the one batch on which it succeeded, and
    may stop only at the end of an epoch. Its reset of the weight of the norm is left out, since it cannot happen: it
    asks for more successes in a row than it takes for the weight to leave the range in which they count.

    Attributes:
        epochs: Most passes over the images.
        batch: Images in each step.
        learning_rate: Adam's until the first milestone.
        milestones: Epochs from which it is 0.1 and 0.05.
        success: Mean pairwise cosine that the patch must reach on a batch, in (−1, 1).
        weight: Where the weight of the norm starts: loss per unit of the norm, which counts each pixel three times.
        smallest: Weight below which it is not lowered any more.
        largest: Weight above which it is not raised any more.
        factor: By which the weight moves.
        patience: It moves after more than this many successes, or failures, in a row.
        stall: Steps without a smaller norm after which the search may stop.
        seed: Of the start and the batches, drawn in the order of the released code on a CPU.
    """

    epochs: int = 1000
    batch: int = 32
    learning_rate: float = 0.5
    milestones: tuple[int, int] = (200, 500)
    success: float = 0.99
    weight: float = 1e-3
    smallest: float = 1e-7
    largest: float = 1e5
    factor: float = 5.0
    patience: int = 5
    stall: int = 35
    seed: int = 80


@dataclass(frozen=True)
class Decree:
    """What a search found.

    Attributes:
        trigger: The smallest patch that reached the similarity; the last one tried where none did.
        l1: Its norm, in pixels: the sum of the mask. The paper's counts each pixel three times.
        pl1: The norm as a share of the image, in [0, 1]; the paper's PL1.
        reached: Whether the similarity was reached. Where it was not, the norm says nothing.
        similarity: Mean pairwise cosine under the trigger on the images searched on.
        held_out_similarity: The same on images kept out of the search.
        resemblance: Mean cosine between the embedding of a held-out image with and without the trigger.
        feature: The target feature: normalised mean embedding of the held-out images under the trigger, shape [D].
        steps: Optimiser steps made.
        passes: Images pushed through the image tower to find and check it.
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


@dataclass(frozen=True)
class _Found:
    """What a search hands over to be checked."""

    patch: Patch
    reached: bool
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
    """Search the smallest patch that makes all embeddings alike.

    Minimises −S + λ · ‖mask‖₁ over mask and pattern, S being the mean cosine over pairs of different images of a batch,
    with a λ that follows success.

    Args:
        encoder: The suspect; only its image tower is used.
        images: uint8, shape [N, 3, H, W] at the encoder's resolution: the images to search on.
        held_out: uint8, shape [M, 3, H, W]: the images to check on.
        settings: How hard to search, or `PublishedSettings` for the search of the released code.
        progress: Told (steps done, most steps).

    Raises:
        ImageError: There are fewer than two images of either kind, or they are of another size.
        UsageError: A setting is out of range.
    """
    _check_images(encoder, images, held_out)
    _check_settings(settings)
    if isinstance(settings, PublishedSettings):
        found = _published(encoder, images, settings, progress)
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
    """The second statistic: collapse the embeddings with no regard to the norm, and see how far they had to move.

    The statistic is the result's `resemblance`. On the first way that the optimiser finds to a mean cosine of `success`
    the embeddings of a backdoored encoder should have to move less, so that it is higher: an unpublished variant of the
    released code, from a uniformly random start; here the start is DECREE's own, which makes no difference. On small
    models of ours its distance from the base's told clean from backdoored little better than chance: report it, do not
    judge by it alone.

    Args:
        encoder: As for `collapse`.
        images: As for `collapse`.
        held_out: As for `collapse`.
        settings: How hard to search; what concerns the norm has no effect.
        progress: Told (steps done, most steps).

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
                f"they are {pixels.dtype} of shape {'×'.join(map(str, pixels.shape))}"
            )
        if len(pixels) < 2:
            raise ImageError(f"pairwise cosines need at least 2 images to {what}, there are {len(pixels)}")


def _check_settings(settings: DecreeSettings | PublishedSettings) -> None:
    if settings.batch < 2:
        raise UsageError(f"pairwise cosines need batches of at least 2 images, the batch is {settings.batch}")
    if not -1 < settings.success < 1:
        raise UsageError(f"the similarity to reach must lie between -1 and 1, it is {settings.success}")
    if settings.factor <= 1:
        raise UsageError(f"the factor of the weight must be larger than 1, it is {settings.factor}")
    if (settings.epochs if isinstance(settings, PublishedSettings) else settings.steps) < 1 or settings.stall < 1:
        raise UsageError("a search needs at least one step, and at least one before it may count as stalled")
    if isinstance(settings, DecreeSettings) and settings.check < 2:
        raise UsageError(f"pairwise cosines need at least 2 images to check on, the settings have {settings.check}")


def _measured(encoder: Classifier, images: Tensor, held_out: Tensor, found: _Found) -> Decree:
    """What a patch does once it is rounded to bytes, under the encoder's own normalisation."""
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
) -> _Found:
    """One search; without the norm in the loss it ends at the first success."""
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
            success = _holds(encoder, patch, check, settings)
            if success:
                best, smallest, improved = Patch(patch.mask.detach(), patch.pattern.detach()), norm, step
        weight *= settings.factor if success else 1 / settings.factor
        progress(step, settings.steps)
        if best is not None and (not regularised or step - improved >= settings.stall):
            break
    if best is None:
        return _Found(Patch.constrain(raw)[0].detach(), reached=False, steps=step, passes=passes)
    if regularised:
        best, passes = _cleared(encoder, best, check, settings), passes + _HALVINGS * len(check)
    return _Found(best.detach(), reached=True, steps=step, passes=passes)


def _decay(done: float) -> float:
    """The learning rate after a share of the steps, relative to that at the start."""
    return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _cleared(encoder: Classifier, patch: Patch, check: Tensor, settings: DecreeSettings) -> Patch:
    """The patch without its faintest pixels, by bisection over the mask's value below which they are cleared."""
    best, low, high = patch, 0.0, 0.5
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        candidate = Patch(patch.mask * (patch.mask >= middle), patch.pattern)
        if _holds(encoder, candidate, check, settings):
            best, low = candidate, middle
        else:
            high = middle
    return best


@torch.no_grad()
def _holds(encoder: Classifier, patch: Patch, check: Tensor, settings: DecreeSettings) -> bool:
    return float(_similarity_under(encoder, patch, check)) >= settings.success


def _similarity_under(encoder: Classifier, patch: Patch, images: Tensor) -> Tensor:
    """Mean pairwise cosine of uint8 images with a patch on them; differentiable in the patch."""
    with encoder.autocast():
        parts = [
            encoder.encode_images(patch.apply(part.to(encoder.device).float() / 255))
            for part in images.split(ENCODE_BATCH)
        ]
    return _similarity(torch.cat(parts))


def _published(
    encoder: Classifier, images: Tensor, settings: PublishedSettings, progress: Callable[[int, int], None]
) -> _Found:
    """The released code's loop."""
    _, height, width = encoder.image_shape
    generator = torch.Generator().manual_seed(settings.seed)
    mask = _unconstrained(torch.rand(height, width, 1, dtype=torch.float64, generator=generator), encoder)
    pattern = _unconstrained(torch.rand(height, width, 3, dtype=torch.float64, generator=generator), encoder)
    torch.rand(1, 512, dtype=torch.float64, generator=generator)  # the released code draws it and leaves it unused
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=encoder.device).view(3, 1, 1)
        for values in (_IMAGENET_MEAN, _IMAGENET_STD)
    )
    optimiser = torch.optim.Adam([mask, pattern], lr=settings.learning_rate, betas=_PUBLISHED_BETAS)
    weight = _PublishedWeight(settings)
    best, best_norm, since, steps, passes = None, float("inf"), 0, 0, 0
    total = settings.epochs * -(-len(images) // settings.batch)
    for epoch in range(settings.epochs):
        for group in optimiser.param_groups:
            group["lr"] = (settings.learning_rate, 0.1, 0.05)[sum(epoch >= start for start in settings.milestones)]
        similarities = []
        for index in _published_epoch(len(images), settings.batch, generator):
            cover, colour = _published_values(mask.repeat(1, 1, 3)), _published_values(pattern) * 255
            pixels = images[index].to(encoder.device).permute(0, 2, 3, 1)
            stamped = ((1 - cover) * pixels + cover * colour).permute(0, 3, 1, 2) / 255
            embeddings = encoder.model.encode_image(((stamped - mean) / std).contiguous().float())
            unit = normalize(embeddings, dim=-1)
            cosines = unit @ unit.T
            similarity = cosines[~torch.eye(len(index), dtype=torch.bool, device=encoder.device)].mean()
            norm = cover.sum()
            optimiser.zero_grad(set_to_none=True)
            (weight.value * norm - similarity).backward()
            optimiser.step()
            value, size = torch.stack([similarity.detach(), norm.detach()]).tolist()
            success = value > settings.success
            since += best is not None
            if success and size < best_norm:
                best, best_norm, since = (cover.detach(), colour.detach()), size, 0
            weight.update(success=success)
            similarities.append(value)
            steps, passes = steps + 1, passes + len(index)
            progress(steps, total)
        if sum(similarities) / len(similarities) > settings.success and since > settings.stall:
            break
    cover, colour = best or (_published_values(mask).detach(), _published_values(pattern).detach() * 255)
    patch = Patch(cover[None, ..., 0].float(), (colour / 255).permute(2, 0, 1).float())
    return _Found(patch.detach(), best is not None, steps, passes)


class _PublishedWeight:
    """λ as the released code moves it."""

    def __init__(self, settings: PublishedSettings) -> None:
        self._settings = settings
        self.value = settings.weight
        self._successes = self._failures = 0

    def update(self, *, success: bool) -> None:
        """After a step."""
        settings = self._settings
        self._successes = self._successes + 1 if success else 0
        self._failures = 0 if success else self._failures + 1
        if self._successes > settings.patience:
            self.value *= settings.factor if self.value < settings.largest else 1
            self._successes = 0
        elif self._failures > settings.patience:
            self.value /= settings.factor if self.value >= settings.smallest else 1
            self._failures = 0


def _unconstrained(values: Tensor, encoder: Classifier) -> Tensor:
    """What `_published_patch` maps to these values in [0, 1]; a leaf."""
    return ((values - 0.5) * (2 - _EPSILON)).atanh().to(encoder.device).requires_grad_()


def _published_values(raw: Tensor) -> Tensor:
    return (raw.tanh() / (2 - _EPSILON) + 0.5).clip(0, 1)


def _published_epoch(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch's batches of indices, drawn as torch's DataLoader draws them from the global generator.

    A last batch of one image has no pairs; the released code's loss is then not a number, here the image is left out.
    """
    _, seed = (torch.empty((), dtype=torch.int64).random_(generator=generator) for _ in range(2))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(int(seed)))
    yield from (part for part in order.split(batch) if len(part) > 1)


def _similarity(embeddings: Tensor) -> Tensor:
    """Mean cosine over pairs of different rows of unit vectors, shape [B, D]."""
    count = len(embeddings)
    return (embeddings.sum(0).square().sum() - embeddings.square().sum()) / (count * (count - 1))
