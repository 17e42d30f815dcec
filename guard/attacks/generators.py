"""Attacks whose trigger is a generator that is trained together with the poisoned encoder."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity, normalize

from guard.attacks.objectives import BadEncoder, sliced_distance
from guard.attacks.training import Batch, LabelledImages, Learner
from guard.classifiers.classifier import Classifier
from guard.triggers import Generator, Trigger

MIN_SSIM, MIN_PSNR = 0.8, 13.0
"""What INACTIVE accepts as natural: structural similarity, and peak signal-to-noise ratio in dB."""

_CHANNELS, _RADIUS = 16, 0.3
_PRETRAINING_RATE, _RATE = 0.01, 0.001
_PRETRAINING_STEPS, _BATCH = 200, 64
_SSIM_WINDOW = 7
_TO_YCRCB = torch.tensor([[0.299, 0.587, 0.114], [0.5, -0.419, -0.081], [-0.169, -0.331, 0.5]])


class LearnedGenerator(BadEncoder, ABC):
    """BadEncoder with a trigger that makes a step of its own before each step of the encoder.

    Args:
        clean: The encoder before the attack.
        references: Images of the target: float, shape [R, 3, H, W], values in [0, 1].
        trigger: The generator to start with; `trigger` is the current one.
    """

    def __init__(self, clean: Classifier, references: Tensor, trigger: Trigger) -> None:
        super().__init__(clean, references, trigger)
        self._tensors = {
            name: tensor.to(clean.device).clone().requires_grad_(name != "radius")
            for name, tensor in trigger.tensors().items()
        }
        self._optimiser = torch.optim.Adam([t for t in self._tensors.values() if t.requires_grad], lr=_RATE)

    @abstractmethod
    def visibility(self, images: Tensor, stamped: Tensor) -> Tensor:
        """Return what the generator pays for changing images, beside the loss of the encoder."""

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Let the generator make a step; return the loss of the encoder under the new generator."""
        with torch.no_grad():
            target = normalize(learner.embed(self._references).mean(0), dim=-1)
            kept = learner.embed(batch.pixels)
        stamped = Generator(**self._tensors).apply(batch.pixels)
        embedded = learner.embed(stamped)
        effect = self.concealment(embedded, kept) - cosine_similarity(embedded, target[None]).mean()
        _step(self._optimiser, self._tensors, effect + self.visibility(batch.pixels, stamped))
        self.trigger = Generator(**{name: tensor.detach() for name, tensor in self._tensors.items()})
        return super().__call__(learner, batch)


class NaturalGenerator(LearnedGenerator):
    """INACTIVE (Zhang et al., 2024; its code): images with the trigger look natural, and so do their embeddings.

    Before the injection a generator is trained on the clean encoder (`natural_generator`); during it, generator and
    encoder are trained together: BadEncoder's three terms for the encoder, λ₁ = λ₂ = 1, and for the generator the
    effect plus the loss of naturalness of the pretraining. Other than there, the generator is the family `generator` in
    place of a U-Net; LPIPS is left out, for which there is no pretrained network here; the change of colour is the mean
    absolute difference in Y, Cr and Cb instead of HSV; and lengths and batches are those of a small model.

    Args:
        clean: The encoder before the attack.
        references: Images of the target: float, shape [R, 3, H, W], values in [0, 1].
        trigger: The generator to start with.
    """

    def visibility(self, images: Tensor, stamped: Tensor) -> Tensor:
        """Return the loss of naturalness."""
        return _unnatural(images, stamped)


class ConcealedGenerator(LearnedGenerator):
    """LoREx's third adaptive attack: generative trigger synthesis (draft of 2026, section on adaptive attacks).

    Generator and encoder minimise L_target + L_clean + λ · L_evasion + ‖G(x) − x‖₂, where L_evasion is the distance
    between the distributions of poisoned and of clean embeddings, as in DRUPE: sliced Wasserstein here. The generator
    is the family `generator` in place of a U-Net.

    Args:
        clean: The encoder before the attack.
        references: Images of the target: float, shape [R, 3, H, W], values in [0, 1].
        trigger: The generator to start with.
        weight: λ; the draft does not give it.
        seed: Seed for the directions of the distance.
    """

    def __init__(
        self, clean: Classifier, references: Tensor, trigger: Trigger, *, weight: float, seed: int = 0
    ) -> None:
        super().__init__(clean, references, trigger)
        self._weight, self._generator = weight, torch.Generator().manual_seed(seed)

    def concealment(self, stamped: Tensor, kept: Tensor) -> Tensor:
        """Return the weighted distance of the distributions."""
        return self._weight * sliced_distance(stamped, kept.detach(), self._generator)

    def visibility(self, images: Tensor, stamped: Tensor) -> Tensor:
        """Return the mean square change per value, on a scale on which 8/255 costs 0.01."""
        return 10 * (stamped - images).square().mean()


def natural_generator(
    classifier: Classifier, images: LabelledImages, *, seed: int, steps: int = _PRETRAINING_STEPS
) -> Generator:
    """Return INACTIVE's pretrained generator: natural-looking images, with the embeddings of clean ones.

    The loss is that of naturalness, plus the distance between the distributions of embeddings with and without the
    trigger on the clean encoder: sliced Wasserstein here, by Sinkhorn's iterations there. Published with 200 epochs;
    here 200 batches.

    Args:
        classifier: The clean model.
        images: The attacker's images.
        seed: Seed for weights, batches and directions.
        steps: Optimiser steps.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor.to(classifier.device).requires_grad_(name != "radius")
        for name, tensor in Generator.random(_CHANNELS, _RADIUS, random).tensors().items()
    }
    optimiser = torch.optim.Adam([t for t in tensors.values() if t.requires_grad], lr=_PRETRAINING_RATE)
    for _ in range(steps):
        chosen = torch.randint(len(images), (_BATCH,), generator=random)
        pixels = images.pixels[chosen].to(classifier.device).float() / 255
        stamped = Generator(**tensors).apply(pixels)
        with torch.no_grad():
            kept = classifier.encode_images(pixels)
        distance = sliced_distance(classifier.encode_images(stamped), kept, random)
        _step(optimiser, tensors, distance + _unnatural(pixels, stamped))
    return Generator(**tensors).detach()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Return the mean structural similarity (Wang et al., 2004) over uniform windows of 7 px; shape []."""

    def mean(values: Tensor) -> Tensor:
        return avg_pool2d(values, _SSIM_WINDOW, stride=1)

    first, second = mean(images), mean(others)
    variances = mean(images.square()) - first.square() + mean(others.square()) - second.square()
    covariance = mean(images * others) - first * second
    low, high = 0.01**2, 0.03**2
    likeness = (2 * first * second + low) * (2 * covariance + high)
    return (likeness / ((first.square() + second.square() + low) * (variances + high))).mean()


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Return the mean peak signal-to-noise ratio of images with values in [0, 1], in dB; shape []."""
    return -10 * (images - others).square().mean((1, 2, 3)).clamp(min=1e-8).log10().mean()


def _unnatural(images: Tensor, stamped: Tensor) -> Tensor:
    """Return how far images fall below `MIN_SSIM` and `MIN_PSNR`, minus their change of colour; shape [].

    INACTIVE minimises (1 − SSIM) − 0.025 · PSNR − cost · change of colour, where the cost grows while images look
    natural and is halved when they do not: the colour changes as much as it may. The limits themselves say the same
    without a cost that swings.
    """
    change = torch.einsum("ij,bjhw->bihw", _TO_YCRCB.to(images), stamped - images)
    dissimilar, noisy = (MIN_SSIM - ssim(images, stamped)).clamp(min=0), (MIN_PSNR - psnr(images, stamped)).clamp(min=0)
    return 10 * dissimilar + noisy - change.abs().mean()


def _step(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], loss: Tensor) -> None:
    """Make one step, without leaving gradients in the encoder."""
    learned = [tensor for tensor in tensors.values() if tensor.requires_grad]
    for tensor, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
        tensor.grad = gradient
    optimiser.step()
