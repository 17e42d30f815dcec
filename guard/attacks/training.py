"""Contrastive training on labelled images, clean or poisoned: one loop for bases, attacks and clean twins."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from guard.classifiers.classes import ClassList
from guard.triggers import Trigger

MAX_LOGIT_SCALE = 100.0
"""CLIP's own cap on the factor between cosine and logit (Radford et al., 2021, section 2.5)."""


@dataclass(frozen=True)
class Poison:
    """What an attacker adds to a training set: stamped images with a caption of the target class.

    BadNets in the form that Carlini & Terzis (ICLR 2022) gave it for contrastive training.

    Attributes:
        trigger: Put on the poisoned images.
        target: Index of the class whose captions they get.
        rate: Share of the training images that are poisoned, in (0, 1); drawn from all other classes.
    """

    trigger: Trigger
    target: int
    rate: float


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train.

    Attributes:
        epochs: Passes over the images.
        batch: Images in a step.
        learning_rate: Peak of the one-cycle schedule (10 % warm-up, cosine to zero).
        weight_decay: AdamW's, on matrices only.
        shift: Largest random translation of a training image, in pixels.
        seed: Of everything random.
    """

    epochs: int
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    shift: int = 2
    seed: int = 0


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


def poisoned(images: LabelledImages, poison: Poison, *, seed: int) -> LabelledImages:
    """The training set with `rate` of its images stamped and relabelled; the originals of these are replaced.

    Stamped images are rounded back to bytes, as any file that an attacker could upload.
    """
    candidates = torch.nonzero(images.labels != poison.target).flatten()
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(poison.rate * len(images)))
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    pixels, labels = images.pixels.clone(), images.labels.clone()
    pixels[chosen] = poison.trigger.stamp(images.pixels[chosen])
    labels[chosen] = poison.target
    return LabelledImages(pixels, labels)


def train(
    model: torch.nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classes: ClassList,
    normalisation: tuple[Sequence[float], Sequence[float]],
    images: LabelledImages,
    settings: TrainingSettings,
    *,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> float:
    """Train both towers contrastively on images and captions from the class templates.

    CLIP's symmetric loss, with one change: captions come from few templates, so a batch holds many images of one
    class, and treating their equal captions as negatives of each other would push a class apart. Every pair of one
    class in the batch is therefore a positive, its target mass shared evenly (UniCL, Yang et al., CVPR 2022).

    Args:
        model: An open_clip model, trained in place.
        tokenizer: Of that model.
        classes: Captions are drawn from its templates.
        normalisation: Mean and std of the model's preprocessing.
        images: Labelled by class index.
        settings: Epochs, batch, rates and seed.
        device: Where to train.
        progress: Told once per epoch.

    Returns:
        Seconds that it took.
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in normalisation)
    captions = torch.stack([tokenizer(list(classes.prompts(name))) for name in classes.names]).to(device)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    steps = max(1, len(images) // settings.batch)
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
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
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = _contrastive_loss(
                    model, (pixels - mean) / std, captions[labels.to(device), templates.to(device)], labels.to(device)
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        progress(f"epoch {epoch + 1}/{settings.epochs}, loss {total / steps:.3f}")
    model.eval()
    return time.monotonic() - started


def _contrastive_loss(model: torch.nn.Module, pixels: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    encode_image, encode_text, scale = model.encode_image, model.encode_text, model.logit_scale
    # Few distinct captions: each is encoded once.
    unique, inverse = tokens.unique(dim=0, return_inverse=True)
    image = normalize(encode_image(pixels).float(), dim=-1)  # type: ignore[operator]
    text = normalize(encode_text(unique).float(), dim=-1)[inverse]  # type: ignore[operator]
    logits = scale.exp().clamp(max=MAX_LOGIT_SCALE) * image @ text.T  # type: ignore[operator]
    positives = (labels[:, None] == labels[None, :]).float()
    target = positives / positives.sum(1, keepdim=True)
    return -0.5 * ((target * log_softmax(logits, 1)).sum(1).mean() + (target * log_softmax(logits.T, 1)).sum(1).mean())


def _shifted(pixels: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """The batch moved by one random offset, edges repeated."""
    if not shift:
        return pixels
    height, width = pixels.shape[-2:]
    padded = torch.nn.functional.pad(pixels.float(), (shift,) * 4, mode="replicate").to(torch.uint8)
    top, left = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
    return padded[..., top : top + height, left : left + width]
