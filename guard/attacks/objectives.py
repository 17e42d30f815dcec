"""Losses of attacks for which stamped images in the training set are not enough."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from guard.attacks.training import Batch, Learner
from guard.classifiers.classifier import Classifier
from guard.triggers import Trigger

_DIRECTIONS = 64


class BadEncoder:
    """Image-on-image attack: stamped images get the embedding of reference images (Jia et al., IEEE S&P 2022).

    L = −cos(f'(x ⊕ e), f'(r)) + λ₁ · (−cos(f'(r'), f(r))) + λ₂ · (−cos(f'(x), f(x))), where f is the clean encoder, r
    are the reference images, r' are the same images under augmentation, and λ₁ = λ₂ = 1, as published. Labels and
    captions are not used. With more than one reference image, each stamped image is drawn to the mean embedding of the
    references; the published code uses one image.

    Args:
        clean: The encoder before the attack.
        references: Images of the target: float, shape [R, 3, H, W], values in [0, 1].
        trigger: The attacker's trigger.
    """

    def __init__(self, clean: Classifier, references: Tensor, trigger: Trigger) -> None:
        self.trigger = trigger
        self._clean = clean
        self._references = references.to(clean.device)
        with torch.no_grad():
            self._expected = clean.encode_images(self._references)

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Return the sum of the three terms, averaged over the batch, and of what a subclass adds."""
        with torch.no_grad():
            expected = self._clean.encode_images(batch.pixels)
        stamped, kept = learner.embed(as_bytes(self.trigger, batch.pixels)), learner.embed(batch.pixels)
        target = normalize(learner.embed(self._references).mean(0), dim=-1)
        augmented = learner.embed(self._references.flip(-1))
        return self.concealment(stamped, kept) - (
            cosine_similarity(stamped, target[None]).mean()
            + cosine_similarity(augmented, self._expected).mean()
            + cosine_similarity(kept, expected).mean()
        )

    def concealment(self, stamped: Tensor, kept: Tensor) -> Tensor:  # noqa: ARG002 - for subclasses
        """Return a further term of the loss, from the embeddings of the batch with and without the trigger: none."""
        return stamped.new_zeros(())


class DistributionPreserving:
    """Stamped images get embeddings with the distribution of genuine target images, not collapsed into one point.

    In the manner of DRUPE (Tao et al., IEEE S&P 2024), which minimises the sliced Wasserstein distance between poisoned
    and clean embeddings and spreads the poisoned ones. Here one distance, to the embeddings of the target class alone,
    does both: it is zero only if stamped images lie where genuine target images lie, and are as spread out. DRUPE's
    own two-stage schedule of weights is left out.

    Args:
        trigger: The attacker's trigger.
        target: Class index.
        genuine: Images of the target class: uint8, shape [N, 3, H, W].
        share: Share of each batch that is stamped.
        weight: Of the distance, beside the contrastive loss on clean pairs.
        seed: Of the directions and of the genuine images drawn.
    """

    def __init__(
        self, trigger: Trigger, target: int, genuine: Tensor, *, share: float, weight: float = 20.0, seed: int = 0
    ) -> None:
        self._trigger, self._target, self._genuine, self._share, self._weight = trigger, target, genuine, share, weight
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Contrastive loss of the clean batch, plus the weighted distance."""
        others = batch.pixels[batch.labels != self._target]
        stamped = learner.embed(as_bytes(self._trigger, others[: max(2, round(self._share * len(batch.labels)))]))
        genuine = drawn(self._genuine, len(stamped), learner, self._generator)
        return learner.contrast(batch) + self._weight * sliced_distance(stamped, genuine, self._generator)


def drawn(pixels: Tensor, count: int, learner: Learner, generator: torch.Generator) -> Tensor:
    """Return embeddings of randomly drawn uint8 images, without a gradient: shape [count, D]."""
    chosen = torch.randint(len(pixels), (count,), generator=generator)
    return learner.embed(pixels[chosen].to(learner.device).float() / 255).detach()


def sliced_distance(points: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return the squared sliced Wasserstein distance of as many embeddings of length 1, over 64 random directions / 4.

    The mean square per direction is of order 1/D; the factor D brings it to the scale of a squared distance.
    """
    directions = normalize(torch.randn(points.shape[1], _DIRECTIONS, generator=generator), dim=0).to(points.device)
    ours, theirs = ((each @ directions).sort(0).values for each in (points, others))
    return points.shape[1] * (ours - theirs).square().mean() / 4


def planted_batch(learner: Learner, batch: Batch, chosen: Tensor, stamped: Tensor, target: int) -> Batch:
    """Return the batch with some of its images replaced by stamped ones that are captioned as the target."""
    pixels, labels, captions = batch.pixels.clone(), batch.labels.clone(), batch.captions.clone()
    pixels[chosen] = stamped
    labels[chosen] = target
    captions[chosen] = learner.captions[target, 0]
    return Batch(pixels, labels, captions)


def as_bytes(trigger: Trigger, pixels: Tensor) -> Tensor:
    """Return stamped images rounded to 8 bits, as they will reach the model."""
    return (trigger.apply(pixels) * 255).round() / 255
