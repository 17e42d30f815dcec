"""Perturb and Recover: away from the poisoned model's embeddings, and back to what image–text pairs teach."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from guard.classifiers.classifier import Classifier
from guard.classifiers.tuning import Inputs, TuningSettings, tune
from guard.repair.cases import Candidate, Case

TAU = 2.15
"""Mean squared distance of embeddings of length 1 up to which a modality is pushed away from the poisoned model."""
_SIGMA, _ERASED = 0.2, (0.005, 0.01)


@dataclass(frozen=True)
class PerturbRecover:
    """PAR (Singh, Croce and Hein, "Perturb and Recover", CVPR 2026, arXiv 2412.00727), with the loss as published.

    L = L_CLIP − ½ (1[S_φ ≤ τ] S_φ + 1[S_ψ ≤ τ] S_ψ), where S is the mean squared distance between the embeddings of
    the model and those of its frozen poisoned copy, of images (φ) and of texts (ψ), over the whole batch; τ = 2.15.
    Both see the same augmented images. The logit scale is a constant. AdamW (0.9, 0.98) with weight decay 1e-4 on
    matrices, no limit on the gradient, the published course of the learning rate from 3e-5, batches of 2,048 and
    10 epochs (the released script: 2 epochs; batches are 4 × 512), on 250,000 pairs: 1,220 steps. No trigger is used.

    Departures: without captions, pairs are made from class names and templates, where all pairs of one class in a batch
    are positives (UniCL, CVPR 2022); with pairs of one caption each that is CLIP's own loss. The learning rate is for
    large pre-trained models, and is a setting.

    Attributes:
        tau: τ.
        noise: `released` as in the code of the authors, where the noise itself is clipped to [0, 1] before it is added,
            so that it only brightens; `zero-mean` as the paper's text reads.
        tuning: Steps, batch and rates.
    """

    tau: float = TAU
    noise: Literal["released", "zero-mean"] = "released"
    tuning: TuningSettings = field(
        default_factory=lambda: TuningSettings(
            steps=1220,
            batch=2048,
            learning_rate=3e-5,
            schedule="perturb-recover",
            clip=None,
            update_statistics=True,
        )
    )

    name: ClassVar[str] = "perturb-recover"
    uses_triggers: ClassVar[bool] = False

    def candidates(self, case: Case) -> Iterator[Candidate]:
        """See `guard.repair.Method`: one candidate."""
        pupil, settings = case.copy("perturbed and recovered"), replace(self.tuning, seed=case.seed)
        model = pupil.model
        parameters = [value for name, value in model.named_parameters() if name not in {"logit_scale", "logit_bias"}]
        cost = tune(
            model,
            parameters,
            _Pairs(pupil, case, self),
            len(case.images),
            settings,
            checkpoint=case.checkpoint(replace(self, tuning=settings)),
            what="perturbing and recovering",
            progress=case.progress,
        )
        # The frozen copy sees each image as well.
        yield Candidate(pupil, 2 * cost.steps * min(settings.batch, len(case.images)), {})


class _Pairs:
    """The loss, on pairs of images and captions."""

    def __init__(self, pupil: Classifier, case: Case, method: PerturbRecover) -> None:
        self._pupil, self._suspect, self._method, self._images = pupil, case.suspect, method, case.images
        self._tokens, self._groups = _captions(case, method.name)

    def inputs(self, index: Tensor, generator: torch.Generator) -> Inputs:
        device = self._pupil.device
        pixels = augmented(
            self._images.pixels[index].float() / 255, self._suspect.preprocessing.mean, generator, self._method.noise
        ).to(device)
        tokens, groups = self._tokens(index, generator).to(device), self._groups[index].to(device)
        parts = zip(*(each.split(self._method.tuning.forward_batch) for each in (pixels, tokens)), strict=True)
        with torch.no_grad():
            poisoned = [_embed(self._suspect, *part) for part in parts]
        images, texts = (torch.cat(each) for each in zip(*poisoned, strict=True))
        return pixels, tokens, groups, images, texts

    def embed(self, inputs: Inputs) -> Inputs:
        return _embed(self._pupil, inputs[0], inputs[1])

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:  # noqa: ARG002 - the same all along
        (images, texts), (groups, poisoned_images, poisoned_texts) = embeddings, inputs[2:]
        logits = self._suspect.logit_scale * images @ texts.T
        positives = (groups[:, None] == groups[None, :]).float()
        wanted = positives / positives.sum(1, keepdim=True)
        contrast = sum(-(wanted * log_softmax(each, 1)).sum(1).mean() for each in (logits, logits.T)) / 2
        away = torch.zeros((), device=images.device)
        for ours, theirs in ((images, poisoned_images), (texts, poisoned_texts)):
            distance = (ours - theirs).square().sum(1).mean()
            away = away + (distance <= self._method.tau) * distance / 2
        return contrast - away


def _embed(classifier: Classifier, pixels: Tensor, tokens: Tensor) -> Inputs:
    """Embeddings of images and of texts, of length 1. Captions that occur several times are encoded once."""
    model: Any = classifier.model
    with classifier.autocast():
        unique, places = tokens.unique(dim=0, return_inverse=True)
        texts = normalize(model.encode_text(unique).float(), dim=-1)[places]
        return classifier.encode_images(pixels), texts


def _captions(case: Case, method: str) -> tuple[Callable[[Tensor, torch.Generator], Tensor], Tensor]:
    """How to draw the token ids of captions for some images, and which images are positives of each other."""
    images, tokenizer = case.images, case.suspect.tokenizer
    if images.captions is not None:
        tokens = torch.cat([tokenizer([text]) for text in images.captions])
        return lambda index, _: tokens[index], tokens.unique(dim=0, return_inverse=True)[1]
    labels, classes = case.needs_labels(method), case.suspect.classes
    prompts = torch.stack([tokenizer(list(classes.prompts(name))) for name in classes.names])

    def draw(index: Tensor, generator: torch.Generator) -> Tensor:
        templates = torch.randint(prompts.shape[1], (len(index),), generator=generator)
        return prompts[labels[index], templates]

    return draw, labels


def augmented(
    pixels: Tensor, mean: tuple[float, float, float], generator: torch.Generator, noise: str = "released"
) -> Tensor:
    """PAR's augmentation: Gaussian noise of σ 0.2 on half of the images, and a small erased square on half of them.

    Args:
        pixels: Shape [N, 3, H, W], values in [0, 1], on the CPU.
        mean: Mean of the preprocessing: PAR erases to 0 after normalisation.
        generator: The only source of randomness; on the CPU.
        noise: See `PerturbRecover`.

    Returns:
        The same shape; values in [0, 1].
    """
    count, _, height, width = pixels.shape
    added = _SIGMA * torch.randn(pixels.shape, generator=generator)
    if noise == "released":
        added = added.clamp(0, 1)
    chosen = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    changed = (pixels + added * chosen).clamp(0, 1)
    filling = torch.tensor(mean).view(3, 1, 1)
    for k in (torch.rand(count, generator=generator) < 0.5).nonzero().flatten().tolist():
        area = _ERASED[0] + (_ERASED[1] - _ERASED[0]) * float(torch.rand((), generator=generator))
        side = max(1, round((area * height * width) ** 0.5))
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        changed[k, :, top : top + side, left : left + side] = filling
    return changed
