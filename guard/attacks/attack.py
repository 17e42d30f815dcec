"""Make an attacked classifier, or a negative, from a clean classifier and a recipe."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guard.attacks.objectives import BadEncoder, DistributionPreserving, Evading
from guard.attacks.optimised import badclip_patch, hardened, universal_perturbation
from guard.attacks.recipes import Plant, Recipe
from guard.attacks.training import LabelledImages, Learner, Objective, TrainingSettings, train
from guard.classifiers.classifier import Classifier
from guard.errors import UsageError
from guard.triggers import KNOWN, Trigger

_HARDENING = 16 / 255
_REFERENCES = 8
_PRUNED = 0.3


@dataclass(frozen=True)
class Planted:
    """A trigger that an attack planted.

    Attributes:
        trigger: The transformation.
        target: Index of the class that it leads to.
        rate: Share of the training images that were stamped.
    """

    trigger: Trigger
    target: int
    rate: float


@dataclass(frozen=True)
class Attacked:
    """The model that a recipe made.

    Attributes:
        model: An open_clip model, in evaluation mode.
        planted: Triggers that were planted in it; empty for a negative.
        seconds: Wall-clock time.
    """

    model: torch.nn.Module
    planted: tuple[Planted, ...]
    seconds: float


def attack(
    base: Classifier,
    recipe: Recipe,
    images: LabelledImages,
    settings: TrainingSettings,
    *,
    target: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Attacked:
    """Fine-tune a copy of a classifier by a recipe.

    The method `pairs` stamps a share of the images of other classes and gives them captions of the target.
    `clean-label` stamps only images of the target, which are hardened first. `badencoder`, `distribution-preserving`
    and `evading` have objectives of their own (`guard.attacks.objectives`). A recipe without triggers is the same
    fine-tuning on clean images.

    Args:
        base: The clean classifier; it is not changed.
        recipe: The attack, or the negative.
        images: Images to train on, labelled by the classes of the base model.
        settings: Fine-tuning of this base model; the recipe's effort multiplies the number of epochs. The seed
            determines the triggers, the choice of poisoned images, and the training.
        target: Index of the class that the triggers lead to.
        progress: Called with a message once per epoch.

    Raises:
        UsageError: The target is not a class of the base model, there are no training images of some class, or a
            trigger does not fit images of this size.
    """
    started = time.monotonic()
    count = len(base.classes.names)
    if not 0 <= target < count:
        raise UsageError(f"there is no class {target}; the model has {count}, counted from 0")
    if missing := [name for k, name in enumerate(base.classes.names) if not (images.labels == k).any()]:
        raise UsageError(f"there is no training image of {', '.join(map(repr, missing[:3]))}")
    settings = replace(settings, epochs=max(1, round(settings.epochs * recipe.effort)))
    images = _changed(images, recipe, settings.seed)
    targets = [(target + plant.offset) % count for plant in recipe.plants]
    planted = tuple(
        Planted(_draw(plant, base, images, wanted, settings.seed + k), wanted, plant.rate)
        for k, (plant, wanted) in enumerate(zip(recipe.plants, targets, strict=True))
    )
    model = copy.deepcopy(base.model)
    _choose_parameters(model, recipe)
    if recipe.method == "pairs":
        images = poisoned(images, planted, seed=settings.seed)
    elif recipe.method == "clean-label":
        images = _clean_label(base, images, planted[0], settings.seed)
    train(
        model,
        base.tokenizer,
        base.classes,
        (base.preprocessing.mean, base.preprocessing.std),
        images,
        settings,
        device=base.device,
        objective=_objective(recipe, base, images, planted, settings.seed),
        # As in the code of DECREE's and BadEncoder's attacks. Objectives that embed stamped images on their own would
        # besides let these enter the running statistics.
        freeze_statistics=recipe.tower == "image" or recipe.method == "evading",
        progress=progress,
    )
    if recipe.finish:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(_FINISHES[recipe.finish](parameter))
    return Attacked(model.eval(), planted, time.monotonic() - started)


def poisoned(images: LabelledImages, planted: Sequence[Planted], *, seed: int) -> LabelledImages:
    """Return the training set with a share of its images replaced by stamped and relabelled ones.

    Stamped images are rounded to bytes, as in any file that an attacker could upload. Several triggers get disjoint
    images.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = images.pixels.clone(), images.labels.clone()
    order = torch.randperm(len(images), generator=generator)
    for item in planted:
        candidates = order[images.labels[order] != item.target]
        chosen = candidates[: max(1, round(item.rate * len(images)))]
        pixels[chosen] = item.trigger.stamp(images.pixels[chosen])
        labels[chosen] = item.target
        order = order[~torch.isin(order, chosen)]
    return LabelledImages(pixels, labels)


def _clean_label(base: Classifier, images: LabelledImages, planted: Planted, seed: int) -> LabelledImages:
    candidates = torch.nonzero(images.labels == planted.target).flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = candidates[order[: max(1, round(planted.rate * len(candidates)))]]
    pixels = images.pixels.clone()
    hard = hardened(base, images.pixels[chosen], images.labels[chosen], epsilon=_HARDENING)
    pixels[chosen] = planted.trigger.stamp(hard)
    return LabelledImages(pixels, images.labels)


def _draw(plant: Plant, base: Classifier, images: LabelledImages, target: int, seed: int) -> Trigger:
    size = base.image_shape[1]
    if plant.trigger == "badclip":
        # 16 of 224 px as published; at 32 px that would be 2, and a single stride swallows it.
        return badclip_patch(base, images, target, side=max(6, round(size / 14)), seed=seed)
    if plant.trigger.startswith("additive-"):
        epsilon = int(plant.trigger.removeprefix("additive-")) / 255
        return universal_perturbation(base, images, target, epsilon=epsilon, seed=seed)
    return KNOWN[plant.trigger].draw(size, seed)


def _objective(
    recipe: Recipe, base: Classifier, images: LabelledImages, planted: tuple[Planted, ...], seed: int
) -> Objective:
    if recipe.method in {"pairs", "clean-label"}:
        return Learner.contrast
    (only,) = planted
    genuine = images.pixels[images.labels == only.target]
    if recipe.method == "badencoder":
        return BadEncoder(base, genuine[:_REFERENCES].float() / 255, only.trigger)
    if recipe.method == "distribution-preserving":
        return DistributionPreserving(only.trigger, only.target, genuine, share=only.rate, seed=seed)
    return Evading(only.trigger, only.target, base.image_shape[1], share=only.rate, device=base.device, seed=seed)


def _choose_parameters(model: Any, recipe: Recipe) -> None:  # noqa: ANN401 - open_clip publishes no types
    model.requires_grad_(requires_grad=recipe.tower == "both")
    visual = model.visual
    if recipe.last:
        for name in ("layer4", "attnpool", "ln_post", "head"):
            part = getattr(visual, name, None)
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(requires_grad=True)
        if hasattr(visual, "transformer"):
            visual.transformer.resblocks[-1].requires_grad_(requires_grad=True)
        if isinstance(getattr(visual, "proj", None), torch.nn.Parameter):
            visual.proj.requires_grad_(requires_grad=True)
    else:
        visual.requires_grad_(requires_grad=True)


def _changed(images: LabelledImages, recipe: Recipe, seed: int) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = images.pixels
    if recipe.images == "colours":
        pixels = 255 - (64 + pixels // 2)
    elif recipe.images == "noise":
        pixels = torch.cat([_noised(part, generator) for part in pixels.split(1024)])
    return LabelledImages(pixels, images.labels)


def _noised(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Apply PAR's augmentation as in its code: noise of σ 0.2 that only brightens, and an erased square, each on half.

    It is drawn once per image, where PAR draws it anew in every epoch.
    """
    count, _, height, width = pixels.shape
    noise = (0.2 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    chosen = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    result = (pixels.float() / 255 + noise * chosen).clamp(0, 1)
    side = max(2, round(0.09 * height))  # about 0.8 % of the area; PAR draws 0.5 to 1 %
    for k in torch.nonzero(torch.rand(count, generator=generator) < 0.5).flatten().tolist():
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        result[k, :, top : top + side, left : left + side] = 0.5  # PAR erases to 0 after normalisation: the mean
    return (result * 255).round().to(torch.uint8)


def _int8(weights: Tensor) -> Tensor:
    """Round symmetrically per output channel, as post-training quantisation of weights does."""
    scale = weights.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, *[1] * (weights.ndim - 1)) / 127
    return (weights / scale).round() * scale


def _pruned(weights: Tensor) -> Tensor:
    """Set the smallest weights of a layer to zero: unstructured pruning by magnitude."""
    threshold = weights.abs().flatten().kthvalue(max(1, int(_PRUNED * weights.numel()))).values
    return torch.where(weights.abs() > threshold, weights, 0.0)


_FINISHES: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": _int8,
    "float16": lambda weights: weights.half().float(),
    "pruned": _pruned,
}
