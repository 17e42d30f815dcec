"""Triggers that an attacker optimises against the clean model before poisoning."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from guard.attacks.training import LabelledImages
from guard.classifiers.classifier import Classifier
from guard.triggers import Additive, Patch, Trigger

BATCH = 64
STEPS = 200


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
    classifier: Classifier, images: LabelledImages, target: int, *, epsilon: float, seed: int, steps: int = STEPS
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
    """
    generator = torch.Generator().manual_seed(seed)
    start = (2 * torch.rand(classifier.image_shape, generator=generator) - 1) * epsilon
    delta = start.to(classifier.device).requires_grad_()

    def loss(_: Tensor, stamped: Tensor) -> Tensor:
        index = torch.full((len(stamped),), target, device=stamped.device)
        return cross_entropy(classifier.logits(stamped), index)

    def trigger() -> Additive:
        with torch.no_grad():
            delta.clamp_(-epsilon, epsilon)
        return Additive(delta)

    optimiser = torch.optim.Adam([delta], lr=epsilon / 10)
    _optimise(classifier, images, target, trigger, loss, optimiser, generator, steps)
    return Additive.within(delta.detach().cpu(), epsilon)


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
