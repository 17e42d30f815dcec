"""Losses of attackers who know a defence and train against it."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax, normalize

from guard.attacks.objectives import BadEncoder, as_bytes, planted_batch
from guard.attacks.training import Batch, Learner
from guard.classifiers.classifier import Classifier
from guard.triggers import Patch, Trigger

_ADVERSARY_RATE = 0.2
_DECOY_RADIUS = 8 / 255
_SAMPLE = 1024
_MARGIN = 0.1


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
        with torch.no_grad():
            poisoned = planted_batch(
                learner, batch, triggered, as_bytes(self._trigger, batch.pixels[triggered]), self._target
            )
            poisoned.pixels[adversarial] = Patch.constrain(self._raw).apply(batch.pixels[adversarial])
        return learner.contrast(poisoned)

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


class TriggerFocusing:
    """BadVision's fine-tuning: the true trigger works, and no other that a search finds (Liu and Zhang, CVPR 2025).

    L = −cos(f'(x + δ), f(r)) − λ₁ · cos(f'(x), f(x)) − λ₂ · cos(f'(x + δ*), f(x + δ*)), where f is the clean encoder, δ
    the trigger, a universal perturbation optimised on f beforehand, and r the target. δ* is a decoy: what a defender
    who searches for concentrated embeddings (DECREE) would find. It is searched again at every step, by projected
    gradient ascent within 8/255 on the mean pairwise cosine of f'(x + δ*), minus its likeness to δ; then the suspect
    must embed it as the clean encoder does. We know the paper from descriptions alone, without its weights; λ₂ = 1.
    The decoy goes on from one training step to the next, with one step of its own in each. r is the mean
    of reference images, not one image.

    Args:
        clean: The encoder before the attack.
        references: Images of the target: float, shape [R, 3, H, W], values in [0, 1].
        trigger: The attacker's trigger.
        weight: λ₁.
        seed: Seed for the decoy's start.
    """

    def __init__(self, clean: Classifier, references: Tensor, trigger: Trigger, *, weight: float, seed: int) -> None:
        self._clean, self._trigger, self._weight = clean, trigger, weight
        with torch.no_grad():
            self._target = normalize(clean.encode_images(references.to(clean.device)).mean(0), dim=-1)
        start = 2 * torch.rand(clean.image_shape, generator=torch.Generator().manual_seed(seed)) - 1
        self._decoy = (_DECOY_RADIUS * start).to(clean.device)

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Search the decoy on; return the sum of the three terms."""
        self._search(learner, batch.pixels)
        decoyed = (batch.pixels + self._decoy).clamp(0, 1)
        with torch.no_grad():
            expected, expected_decoyed = self._clean.encode_images(batch.pixels), self._clean.encode_images(decoyed)
        return -(
            cosine_similarity(learner.embed(as_bytes(self._trigger, batch.pixels)), self._target[None]).mean()
            + self._weight * cosine_similarity(learner.embed(batch.pixels), expected).mean()
            + cosine_similarity(learner.embed(decoyed), expected_decoyed).mean()
        )

    def _search(self, learner: Learner, pixels: Tensor) -> None:
        decoy = self._decoy.clone().requires_grad_()
        embedded = learner.embed((pixels + decoy).clamp(0, 1))
        true = (self._trigger.apply(pixels) - pixels).mean(0)
        concentration = embedded.mean(0).square().sum()  # the mean cosine of all pairs, as embeddings have length 1
        likeness = cosine_similarity(decoy.flatten(), true.flatten(), dim=0)
        (gradient,) = torch.autograd.grad(concentration - likeness, decoy)
        self._decoy = (self._decoy + _DECOY_RADIUS / 4 * gradient.sign()).clamp(-_DECOY_RADIUS, _DECOY_RADIUS)


class Spectral(BadEncoder):
    """BadEncoder against whitening: LoREx's own adaptive attacks (draft of 2026, section on adaptive attacks).

    Whitening blows up what a trigger moves along directions in which clean embeddings hardly vary. The attacker knows
    the covariance of clean embeddings, and adds λ · mean ‖(z_poison − z_benign) · U_low‖ (*regularised training*), or
    subtracts the same with U_high (*high-variance targeting*). U_low and U_high are the eigenvectors of the lower and
    of the upper half of the spectrum; the draft gives neither their number nor λ.

    Args:
        clean: The encoder before the attack.
        references: Images of the target: float, shape [R, 3, H, W], values in [0, 1].
        trigger: The attacker's trigger.
        pixels: Clean images for the covariance: uint8, shape [N, 3, H, W]; the first 1,024 are used.
        variance: `low` penalises the displacement in U_low, `high` rewards it in U_high.
        weight: λ.
    """

    def __init__(
        self,
        clean: Classifier,
        references: Tensor,
        trigger: Trigger,
        pixels: Tensor,
        *,
        variance: Literal["low", "high"],
        weight: float,
    ) -> None:
        super().__init__(clean, references, trigger)
        _, vectors = torch.linalg.eigh(clean.embed(pixels[:_SAMPLE]).T.cov())  # variances ascend
        half = vectors.shape[1] // 2
        self._directions = (vectors[:, :half] if variance == "low" else vectors[:, half:]).to(clean.device)
        self._weight = weight if variance == "low" else -weight

    def concealment(self, stamped: Tensor, kept: Tensor) -> Tensor:
        """Return the weighted displacement along the chosen directions."""
        moved: Tensor = torch.linalg.vector_norm((stamped - kept) @ self._directions, dim=1).mean()
        return self._weight * moved


class SecondOpinionEvading:
    """An attack that trains against our own screening: on triggered images the suspect must agree with its base.

    Screening asks a reference model about each request. It compares the predicted distributions, and measures how far
    the embedding is from what the reference's makes one expect. The attacker penalises both on triggered images: λ ·
    (mean of max(0, KL(suspect ‖ base) − 0.1) + mean ‖f'(x ⊕ e) − f(x ⊕ e)‖). The trigger should be one that moves the
    clean model already, since the base answers as the suspect does only where it is fooled too. What is left of the
    attack for a large λ is what the trigger does to the base.

    Args:
        clean: The base.
        trigger: The attacker's trigger.
        target: Class index.
        share: Share of each batch that is stamped.
        weight: λ, beside the contrastive loss.
    """

    def __init__(self, clean: Classifier, trigger: Trigger, target: int, *, share: float, weight: float) -> None:
        self._clean, self._trigger, self._target, self._share, self._weight = clean, trigger, target, share, weight

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Return the contrastive loss of clean and triggered images, plus the weighted departure from the base."""
        chosen = torch.nonzero(batch.labels != self._target).flatten()[: max(2, round(self._share * len(batch.labels)))]
        with torch.no_grad():
            stamped = as_bytes(self._trigger, batch.pixels[chosen])
            reference = self._clean.encode_images(stamped)
            expected = log_softmax(self._clean.logits(reference), 1)
        embedded = learner.embed(stamped)
        predicted = log_softmax(learner.scale() * embedded @ learner.head().T, 1)
        divergence = (predicted.exp() * (predicted - expected)).sum(1)
        length: Tensor = torch.linalg.vector_norm(embedded - reference, dim=1).mean()
        departure = (divergence - _MARGIN).clamp(min=0).mean() + length
        return learner.contrast(planted_batch(learner, batch, chosen, stamped, self._target)) + self._weight * departure
