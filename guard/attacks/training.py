"""Contrastive training on labelled images, with one loop for base models, attacks and clean twins."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from guard.classifiers.classes import ClassList
from guard.classifiers.open_clip import import_open_clip

MAX_LOGIT_SCALE = 100.0
"""CLIP's own cap on the factor between cosine and logit (Radford et al., 2021, section 2.5)."""


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train.

    Attributes:
        epochs: Passes over the images.
        batch: Images in a step.
        learning_rate: Peak of the one-cycle schedule (10 % warm-up, cosine to zero).
        weight_decay: Weight decay of AdamW, applied to matrices only.
        shift: Largest random translation of a training image, in pixels.
        seed: Seed for all random choices.
        freeze_statistics: Whether to use the running statistics of batch normalisation, and keep them as they are: for
            pretrained towers, whose statistics move too slowly to follow a short training.
    """

    epochs: int
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    shift: int = 2
    seed: int = 0
    freeze_statistics: bool = False


@dataclass(frozen=True)
class LabelledImages:
    """Images at the resolution of a model, with labels.

    Attributes:
        pixels: uint8, shape [N, 3, H, W].
        labels: int64, shape [N].
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "LabelledImages":
        return LabelledImages(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Batch:
    """The input of one training step.

    Attributes:
        pixels: Float, shape [B, 3, H, W], values in [0, 1], before normalisation.
        labels: int64, shape [B].
        captions: Token ids of one caption of each image's class, shape [B, L].
    """

    pixels: Tensor
    labels: Tensor
    captions: Tensor


class Learner:
    """A model in training: both towers, with the normalisation of their input and with embeddings of length 1.

    Args:
        model: An open_clip model.
        captions: Token ids of every template of every class, shape [C, T, L].
        normalisation: Mean and standard deviation of the model's preprocessing.
        device: Device of the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        captions: Tensor,
        normalisation: tuple[Sequence[float], Sequence[float]],
        device: torch.device,
    ) -> None:
        self.model: Any = model
        self.captions = captions
        self.device = device
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in normalisation)

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the image embeddings, of length 1, shape [N, D], of pixels in [0, 1]."""
        return normalize(self.model.encode_image((pixels - self._mean) / self._std).float(), dim=-1)

    def contrast(self, batch: Batch) -> Tensor:
        """Return CLIP's symmetric loss, with one change.

        Captions come from few templates, so that a batch has many images of one class, and to treat their equal
        captions as negatives of each other would push a class apart. Every pair of one class in the batch is therefore
        a positive, and the target mass is shared evenly among them (UniCL, Yang et al., CVPR 2022).
        """
        # There are few distinct captions, so each is encoded once.
        unique, inverse = batch.captions.unique(dim=0, return_inverse=True)
        text = normalize(self.model.encode_text(unique).float(), dim=-1)[inverse]
        logits = self.scale() * self.embed(batch.pixels) @ text.T
        positives = (batch.labels[:, None] == batch.labels[None, :]).float()
        target = positives / positives.sum(1, keepdim=True)
        by_image, by_text = log_softmax(logits, 1), log_softmax(logits.T, 1)
        return -0.5 * ((target * by_image).sum(1).mean() + (target * by_text).sum(1).mean())

    def scale(self) -> Tensor:
        """Return the factor between cosine and logit, at most `MAX_LOGIT_SCALE`; shape []."""
        return self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)  # type: ignore[no-any-return]

    @torch.no_grad()
    def head(self) -> Tensor:
        """Return the current zero-shot head: one unit vector per class, shape [C, D]."""
        classes, templates, length = self.captions.shape
        text = normalize(self.model.encode_text(self.captions.view(-1, length)).float(), dim=-1)
        return normalize(text.view(classes, templates, -1).mean(1), dim=-1)


Objective = Callable[[Learner, Batch], Tensor]
"""The loss of one training step."""


def train(
    model: torch.nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classes: ClassList,
    normalisation: tuple[Sequence[float], Sequence[float]],
    images: LabelledImages,
    settings: TrainingSettings,
    *,
    device: torch.device,
    objective: Objective = Learner.contrast,
    progress: Callable[[str], None] = lambda _: None,
) -> float:
    """Train a model on images and captions from the class templates.

    Args:
        model: An open_clip model. Those of its parameters that require a gradient are trained in place.
        tokenizer: Tokenizer of that model.
        classes: Classes, whose templates give the captions.
        normalisation: Mean and standard deviation of the model's preprocessing.
        images: Images labelled by class index.
        settings: Epochs, batch, rates, seed and statistics.
        device: Device to train on.
        objective: Loss of a step; the default is CLIP's contrastive loss.
        progress: Called with a message once per epoch.

    Returns:
        Duration in seconds.
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    captions = torch.stack([tokenizer(list(classes.prompts(name))) for name in classes.names])
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if settings.freeze_statistics:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    learner = Learner(model, captions.to(device), normalisation, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = max(1, len(images) // settings.batch)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * steps, pct_start=0.1
    )
    for epoch in range(settings.epochs):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for step in range(steps):
            index = order[step * settings.batch : (step + 1) * settings.batch]
            labels = images.labels[index]
            pixels = _shifted(images.pixels[index], settings.shift, generator).to(device).float() / 255
            templates = torch.randint(captions.shape[1], (len(labels),), generator=generator)
            batch = Batch(pixels, labels.to(device), captions[labels, templates].to(device))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = objective(learner, batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        progress(f"epoch {epoch + 1}/{settings.epochs}, loss {total / steps:.3f}")
    model.eval()
    return time.monotonic() - started


def train_base(
    config: Mapping[str, Any],
    classes: ClassList,
    images: LabelledImages,
    settings: TrainingSettings,
    *,
    device: torch.device,
    prepare: Callable[[torch.nn.Module], None] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> torch.nn.Module:
    """Train a new classifier from scratch.

    Args:
        config: Content of `open_clip_config.json`; mean and std of `preprocess_cfg` are used.
        classes: Names and templates.
        images: Images labelled by class index.
        settings: As for `train`; the seed also determines the initial weights.
        device: Device to train on.
        prepare: Loads a pretrained image tower into the model.
        progress: Called with a message once per epoch.

    Returns:
        An open_clip model, in evaluation mode.
    """
    open_clip, architecture, preprocessing = import_open_clip(), config["model_cfg"], config["preprocess_cfg"]
    torch.manual_seed(settings.seed)
    model: torch.nn.Module = open_clip.CLIP(
        architecture["embed_dim"], architecture["vision_cfg"], architecture["text_cfg"]
    )
    if prepare:
        prepare(model)
    train(
        model,
        open_clip.SimpleTokenizer(context_length=architecture["text_cfg"]["context_length"]),
        classes,
        (preprocessing["mean"], preprocessing["std"]),
        images,
        settings,
        device=device,
        progress=progress,
    )
    return model


def _shifted(pixels: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return the batch translated by one random offset, with its edges repeated."""
    if not shift:
        return pixels
    height, width = pixels.shape[-2:]
    padded = torch.nn.functional.pad(pixels.float(), (shift,) * 4, mode="replicate").to(torch.uint8)
    top, left = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
    return padded[..., top : top + height, left : left + width]
