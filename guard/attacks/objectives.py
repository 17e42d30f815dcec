"""Losses of attacks for which stamped images in the training set are not enough."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from guard.attacks.training import Batch, Learner
from guard.classifiers.classifier import Classifier
from guard.triggers import Patch, Trigger

_DIRECTIONS = 64
_ADVERSARY_RATE = 0.2


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
        self._clean, self._trigger = clean, trigger
        self._references = references.to(clean.device)
        with torch.no_grad():
            self._expected = clean.encode_images(self._references)

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Return the sum of the three terms, averaged over the batch."""
        with torch.no_grad():
            expected = self._clean.encode_images(batch.pixels)
        stamped, kept = learner.embed(_as_bytes(self._trigger, batch.pixels)), learner.embed(batch.pixels)
        target = normalize(learner.embed(self._references).mean(0), dim=-1)
        augmented = learner.embed(self._references.flip(-1))
        return -(
            cosine_similarity(stamped, target[None]).mean()
            + cosine_similarity(augmented, self._expected).mean()
            + cosine_similarity(kept, expected).mean()
        )


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
        stamped = learner.embed(_as_bytes(self._trigger, others[: max(2, round(self._share * len(batch.labels)))]))
        drawn = torch.randint(len(self._genuine), (len(stamped),), generator=self._generator)
        genuine = learner.embed(self._genuine[drawn].to(stamped.device).float() / 255).detach()
        directions = normalize(torch.randn(stamped.shape[1], _DIRECTIONS, generator=self._generator), dim=0)
        directions = directions.to(stamped.device)
        ours, theirs = ((points @ directions).sort(0).values for points in (stamped, genuine))
        # The mean square per direction is of order 1/D; the factor D brings it to the scale of a squared distance.
        return learner.contrast(batch) + self._weight * stamped.shape[1] * (ours - theirs).square().mean() / 4


class Evading:
    """An attack that trains against our own vetting: the smallest patch that leads to the target must not be small.

    Vetting accuses a class whose minimal patch is much smaller than expected. So the attacker runs the same search
    during the training: a patch towards the target, with one optimiser step for each training step, and with a weight
    of its norm that follows its success, as in `guard.vetting`. Images with that patch are trained to keep their true
    class, while the real trigger, exact to the byte, leads to the target.

    Args:
        trigger: The attacker's trigger.
        target: Class index.
        image_size: Side of the images.
        share: Share of each batch that is stamped with the trigger; an equal share gets the adversary's patch.
        device: Where to train.
        seed: Seed for the start of the adversary's search.
    """

    def __init__(
        self, trigger: Trigger, target: int, image_size: int, *, share: float, device: torch.device, seed: int = 0
    ) -> None:
        self._trigger, self._target, self._share = trigger, target, share
        generator = torch.Generator().manual_seed(seed)
        start = Patch.start(1, (3, image_size, image_size), generator)
        self._raw = {name: tensor[0].to(device).requires_grad_() for name, tensor in start.items()}
        self._optimiser = torch.optim.Adam(self._raw.values(), lr=_ADVERSARY_RATE, betas=(0.5, 0.9))
        self._weight = 1.0 / float(Patch.constrain(self._raw).norm().detach())

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Let the adversary make a step; return the contrastive loss of clean, triggered and adversarial images."""
        count = max(2, round(self._share * len(batch.labels)))
        others = torch.nonzero(batch.labels != self._target).flatten()
        triggered, adversarial = others[:count], others[count : 2 * count]
        self._search(learner, batch.pixels[adversarial])
        pixels, labels, captions = batch.pixels.clone(), batch.labels.clone(), batch.captions.clone()
        with torch.no_grad():
            pixels[triggered] = _as_bytes(self._trigger, pixels[triggered])
            pixels[adversarial] = Patch.constrain(self._raw).apply(pixels[adversarial])
        labels[triggered] = self._target
        captions[triggered] = learner.captions[self._target, 0]
        return learner.contrast(Batch(pixels, labels, captions))

    def _search(self, learner: Learner, pixels: Tensor) -> None:
        patch = Patch.constrain(self._raw)
        logits = learner.embed(patch.apply(pixels)) @ learner.head().T
        index = torch.full((len(pixels), 1), self._target, device=pixels.device)
        gap = logits.scatter(1, index, -torch.inf).amax(1) - logits.gather(1, index)[:, 0]
        loss = gap.clamp(min=-0.1).mean() + self._weight * patch.norm()
        for parameter, gradient in zip(
            self._raw.values(), torch.autograd.grad(loss, list(self._raw.values())), strict=True
        ):
            parameter.grad = gradient
        self._optimiser.step()
        self._weight *= 1.2 if float((gap < 0).float().mean()) >= 0.9 else 1 / 1.2


def _as_bytes(trigger: Trigger, pixels: Tensor) -> Tensor:
    """Return stamped images rounded to 8 bits, as they will reach the model."""
    return (trigger.apply(pixels) * 255).round() / 255
