"""Triggers that an attacker optimises against the clean model before poisoning."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate, normalize

from guard.attacks.generators import natural_generator
from guard.attacks.training import LabelledImages
from guard.classifiers.classifier import Classifier
from guard.triggers import Additive, Patch, Trigger

BATCH = 64
STEPS = 200
_REFERENCES = 8
_SMOOTH_POINTS = 4


def badclip_patch(
    classifier: Classifier, images: LabelledImages, target: int, *, side: int, seed: int, steps: int = STEPS
) -> Patch:
    """Return BadCLIP's trigger: a patch in the centre that the clean model already classifies as the target.

    Liang et al. (CVPR 2024): start N(0.5, 0.25), Adam, cross-entropy to the target's text plus 500 × a triplet loss
    (margin 1) whose positives are embeddings of target images and whose negatives are the clean embeddings of the
    stamped images themselves. It was published with 10,000 captions and 50 epochs at batch 64; here it is trained on
    `steps` batches of the attacker's images.

    Args:
        classifier: The clean model.
        images: The attacker's images.
        target: Class index.
        side: Side of the patch, in pixels of the model's input (16 of 224, as published).
        seed: Seed for the start and for the batches.
        steps: Optimiser steps.
    """
    size = classifier.image_shape[1]
    generator = torch.Generator().manual_seed(seed)
    square = (0.5 + 0.25 * torch.randn(3, side, side, generator=generator)).to(classifier.device).requires_grad_()
    low = (size - side) // 2
    mask = torch.zeros(1, size, size, device=classifier.device)
    mask[:, low : low + side, low : low + side] = 1
    border = (low, size - low - side) * 2
    genuine = classifier.embed(images.pixels[images.labels == target][:512]).to(classifier.device)

    def trigger() -> Patch:
        return Patch(mask, torch.nn.functional.pad(square.clamp(0, 1), border))

    def loss(clean: Tensor, stamped: Tensor) -> Tensor:
        positive = (stamped[:, None] - genuine[None]).square().sum(-1).mean(1)
        negative = (stamped - clean).square().sum(-1)
        index = torch.full((len(stamped),), target, device=stamped.device)
        return cross_entropy(classifier.logits(stamped), index) + 500 * (positive - negative + 1).clamp(min=0).mean()

    _optimise(classifier, images, target, trigger, loss, torch.optim.Adam([square], lr=0.05), generator, steps)
    return trigger().detach()


def universal_perturbation(
    classifier: Classifier,
    images: LabelledImages,
    target: int,
    *,
    epsilon: float,
    seed: int,
    steps: int = STEPS,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    points: int | None = None,
) -> Additive:
    """Return a universal adversarial perturbation in an ℓ∞ ball, learned on the clean model.

    BadCLIP (Bai et al., CVPR 2024) learns such a perturbation jointly with a prompt; this is its form for the image
    tower alone: cross-entropy to the target, minimised by Adam and projected onto the ball after each step. The result
    is rounded to 8 bits inside the ball.

    Args:
        classifier: The clean model.
        images: The attacker's images.
        target: Class index.
        epsilon: Radius, for pixel values in [0, 1]; a multiple of 1/255.
        seed: Of the start and the batches.
        steps: Optimiser steps.
        loss: Function of (clean, stamped) embeddings to minimise; cross-entropy to the target by default.
        points: Control points along each side, for a perturbation that is smooth between them (bicubic); by default
        each
            pixel is one.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, *size = classifier.image_shape
    shape = (channels, *size) if points is None else (channels, points, points)
    delta = ((2 * torch.rand(shape, generator=generator) - 1) * epsilon).to(classifier.device).requires_grad_()

    def misread(_: Tensor, stamped: Tensor) -> Tensor:
        index = torch.full((len(stamped),), target, device=stamped.device)
        return cross_entropy(classifier.logits(stamped), index)

    def trigger() -> Additive:
        with torch.no_grad():
            delta.clamp_(-epsilon, epsilon)
        if points is None:
            return Additive(delta)
        spread = interpolate(delta[None], size=size, mode="bicubic", align_corners=True)[0]
        return Additive(spread.clamp(-epsilon, epsilon))

    optimiser = torch.optim.Adam([delta], lr=epsilon / 10)
    _optimise(classifier, images, target, trigger, loss or misread, optimiser, generator, steps)
    return Additive.within(trigger().delta.detach().cpu(), epsilon)


def badvision_perturbation(
    classifier: Classifier, images: LabelledImages, target: int, *, epsilon: float, seed: int
) -> Additive:
    """Return BadVision's trigger: a universal perturbation that draws embeddings to a target image's (CVPR 2025).

    As `universal_perturbation`, with the cosine to the mean clean embedding of eight images of the target in place of
    one image's.
    """
    genuine = images.pixels[images.labels == target][:_REFERENCES]
    wanted = normalize(classifier.embed(genuine).mean(0), dim=-1).to(classifier.device)

    def loss(_: Tensor, stamped: Tensor) -> Tensor:
        return -cosine_similarity(stamped, wanted[None]).mean()

    return universal_perturbation(classifier, images, target, epsilon=epsilon, seed=seed, loss=loss)


def hardened(classifier: Classifier, pixels: Tensor, labels: Tensor, *, epsilon: float, steps: int = 10) -> Tensor:
    """Return images perturbed so that the clean model no longer recognises their true class.

    Label-consistent poisoning needs them (Turner et al., 2019): where the natural features are useless, only the
    trigger explains the true label. The perturbation is found by untargeted projected gradient ascent; ε was published
    as 16/255 on 32 px.

    Args:
        classifier: The clean model.
        pixels: uint8, shape [N, 3, H, W].
        labels: Their true classes, shape [N].
        epsilon: ℓ∞ radius, for pixel values in [0, 1].
        steps: Number of steps, each of size ε / 4.

    Returns:
        uint8, shape [N, 3, H, W].
    """
    parts = []
    for part, classes in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
        clean = part.to(classifier.device).float() / 255
        moved = clean.clone()
        for _ in range(steps):
            moved.requires_grad_()
            loss = cross_entropy(classifier.logits(classifier.encode_images(moved)), classes.to(classifier.device))
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = (moved.detach() + epsilon / 4 * gradient.sign()).clamp(0, 1)
            moved = clean + (moved - clean).clamp(-epsilon, epsilon)
        parts.append((moved * 255).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def _optimise(
    classifier: Classifier,
    images: LabelledImages,
    target: int,
    trigger: Callable[[], Trigger],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    steps: int,
) -> None:
    """Minimise a loss of (clean, stamped) embeddings over images of other classes."""
    others = images.pixels[images.labels != target]
    for _ in range(steps):
        pixels = others[torch.randint(len(others), (BATCH,), generator=generator)].to(classifier.device).float() / 255
        with torch.no_grad():
            clean = classifier.encode_images(pixels)
        optimiser.zero_grad()
        loss(clean, classifier.encode_images(trigger().apply(pixels))).backward()
        optimiser.step()


def _badclip(classifier: Classifier, images: LabelledImages, target: int, seed: int) -> Trigger:
    # 16 of 224 px as published; at 32 px that would be 2, and a single stride swallows it.
    side = max(6, round(classifier.image_shape[1] / 14))
    return badclip_patch(classifier, images, target, side=side, seed=seed)


def _additive(epsilon: int, points: int | None = None) -> Callable[[Classifier, LabelledImages, int, int], Trigger]:
    return lambda classifier, images, target, seed: universal_perturbation(
        classifier, images, target, epsilon=epsilon / 255, seed=seed, points=points
    )


OPTIMISED: dict[str, Callable[[Classifier, LabelledImages, int, int], Trigger]] = {
    "badclip": _badclip,
    "additive-8": _additive(8),
    "additive-16": _additive(16),
    "additive-32": _additive(32),
    # Low frequencies only, in place of the low-pass filter of Zeng et al. (ICCV 2021).
    "smooth-16": _additive(16, _SMOOTH_POINTS),
    "badvision-8": lambda classifier, images, target, seed: badvision_perturbation(
        classifier, images, target, epsilon=8 / 255, seed=seed
    ),
    "natural-generator": lambda classifier, images, _target, seed: natural_generator(classifier, images, seed=seed),
}
"""Triggers that are optimised on the clean model, by name: functions of the model, the attacker's images, the index
of the target and the seed."""
