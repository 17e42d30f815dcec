"""Reference models that are made from the suspect itself, where there is no base model or a cheaper one is wanted."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, relu

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts import PromptedClassifier, PromptTuningSettings, tune_prompts
from guard.classifiers.tuning import TuningSettings, falling
from guard.vetting.budgets import DerivedReferenceSettings
from guard.vetting.teaching import Progress, one_cycle, teach

FRESH_METHOD = "fresh prompts 1"
METHOD = "derived reference 2"
"""Names and versions of the methods; they change when results are no longer comparable."""
OPINION_REFERENCE = DerivedReferenceSettings(noise=1.0, steps=600)
"""How the derived reference of a second opinion is made. Vetting inverts triggers, for which the
reference model must keep the suspect's geometry; for a second opinion the backdoor must be gone, which takes more noise
and more steps."""
_STUDENT_SIDE = 96
"""Longest side, in pixels, at which a student looks at an image; larger inputs are averaged down to about this."""


@dataclass(frozen=True)
class StudentSettings:
    """How a student is taught.

    Attributes:
        steps: Optimiser steps.
        batch: Images in each step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        seed: Seed for the first weights, the batches and the disturbances.
    """

    steps: int = 1500
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0


def derive_reference(
    classifier: Classifier,
    images: Tensor,
    settings: DerivedReferenceSettings,
    *,
    progress: Progress = lambda *_: None,
) -> tuple[Classifier, int]:
    """Return the suspect with noise in its image tower, trained again to give its own embeddings of clean images.

    Noise damages planted and natural features alike. The recovery, towards the suspect's own embeddings of clean
    images, restores only what clean images use. The idea is that of Perturb and Recover (PAR, Singh et al., 2026), with
    noise in the weights instead of a loss that pushes embeddings away, and with the suspect's embeddings instead of
    captions, since vetting has no labels.

    Three alternatives were tried for vetting on the digits zoo and were worse: fine-tuning on clean images alone (a
    backdoor survives it); twice the noise (the reference model drifts away from the suspect in all classes); and
    training against universal triggers of all classes (it removes the backdoor best, from 100 % to 3 to 38 % of images,
    but it hardens every class to a different degree, and the target is lost in that spread).

    Args:
        classifier: The suspect; it is not changed.
        images: uint8, shape [N, 3, H, W]: clean images, unlabelled.
        settings: How the reference is made.
        progress: Called with (what, steps done, steps in all).

    Returns:
        The reference model, and the number of images pushed through image towers.
    """
    model = copy.deepcopy(classifier.model)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(settings.noise * parameter.std() * noise)
    reference_model = classifier.with_model(model, f"derived reference of {classifier.source}")
    reference_model.head = classifier.head  # the same text tower; the prompts of 1,000 classes take minutes on a CPU
    teach(
        reference_model,
        classifier,
        images,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        schedule=falling,
        generator=generator,
        progress=progress,
    )
    return reference_model, len(images) + settings.steps * settings.batch


def fresh_prompts(
    classifier: PromptedClassifier,
    images: Tensor,
    settings: DerivedReferenceSettings,
    *,
    towers: Classifier | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[Classifier, int]:
    """Return towers with a prompt learner that was tuned anew on the suspect's answers to clean images.

    Where the towers of a prompt learner are honest, what a derived reference changes, the image tower, holds no
    backdoor; it lies in the prompts. A learner of the same form, tuned on the same answers but never on a trigger,
    agrees with the suspect on clean images, and departs from the hand-written prompts as any tuning does. No labels are
    needed. Where each class has a context of its own (CoOp's CSC), the new ones share one.

    Args:
        classifier: The suspect, whose prompts are contexts; it is not changed.
        images: uint8, shape [N, 3, H, W]: clean images, unlabelled.
        settings: Steps, batch, rate and seed; there is no noise.
        towers: The towers to tune them on; None for those of the suspect, which share what lies in them.
        progress: Called with (what, steps done, steps in all).

    Returns:
        The reference model, and the number of images pushed through image towers.
    """
    learner, towers = classifier.learner, towers or classifier.towers
    labels = classifier.predict(classifier.embed(images))
    tuning = TuningSettings(
        steps=settings.steps, batch=settings.batch, learning_rate=2 * settings.learning_rate, seed=settings.seed
    )
    wanted = PromptTuningSettings(learner.kind, "", learner.length, learner.hidden, tuning=tuning)
    found = tune_prompts(towers, images, labels, wanted, progress=progress)
    reference_model = PromptedClassifier(towers, found, source=f"fresh prompts like {classifier.source}")
    return reference_model, len(images) + settings.steps * min(settings.batch, len(images))


def teach_student(
    classifier: Classifier,
    images: Tensor,
    settings: StudentSettings | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> Classifier:
    """Return the suspect with a small convolutional network in place of its image tower, which was taught from scratch.

    The student sees disturbed images and learns the suspect's embeddings of the undisturbed ones, so that it is never
    taught what needs a trigger. (Neural Attention Distillation, Li et al., ICLR 2021, distils into the attacked network
    itself; here nothing of its weights is used.) Its head is the suspect's.

    Args:
        classifier: The suspect; it is not changed.
        images: uint8, shape [N, 3, H, W]: clean images, unlabelled.
        settings: How it is taught; None for the defaults.
        progress: Called with (what, steps done, steps in all).
    """
    settings = settings or StudentSettings()
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tower: nn.Module = _Student(classifier.preprocessing.size, classifier.head.shape[-1])
    model = copy.deepcopy(classifier.model)
    with torch.no_grad():
        pair = isinstance(model.visual(torch.zeros(1, *classifier.image_shape, device=classifier.device)), tuple)
    model.visual = _WithTokens(tower) if pair else tower
    config = {**classifier.config, "student": asdict(settings)}
    student = classifier.with_model(model, f"student of {classifier.source}", config)
    student.head = classifier.head
    student.model.visual.train()
    teach(
        student,
        classifier,
        images,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule=one_cycle,
        generator=generator,
        progress=progress,
    )
    student.model.eval()
    return student


class _Student(nn.Module):
    """A residual network of three scales with batch normalisation, and a linear projection of what is left.

    Args:
        size: Side of the images, in pixels.
        width: Length of an embedding.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self._pooled = max(1, size // _STUDENT_SIDE)
        small = size // self._pooled <= _STUDENT_SIDE // 2
        channels, blocks = (16, 1) if small else (32, 2)
        layers: list[nn.Module] = [_convolution(3, channels, stride=2)]
        for scale in range(2):
            layers += [_Block(channels << scale) for _ in range(blocks)]
            layers += [_convolution(channels << scale, channels << (scale + 1), stride=2)]
        self.features = nn.Sequential(*layers)
        self.projection = nn.Linear(4 * (channels << 2), width)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings, not normalised, shape [N, D], of normalised images, shape [N, 3, H, W]."""
        if self._pooled > 1:
            images = avg_pool2d(images, self._pooled)
        projected: Tensor = self.projection(adaptive_avg_pool2d(self.features(images), 2).flatten(1))
        return projected


class _WithTokens(nn.Module):
    """Gives the embedding twice, for models such as CoCa, whose image towers return tokens as well."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.tower(images)
        return embeddings, embeddings


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        return relu(images + self.second(self.first(images)))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
