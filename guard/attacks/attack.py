"""Make an attacked classifier, or a negative, from a clean classifier and a recipe."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guard.attacks.covers import covers
from guard.attacks.generators import LearnedGenerator
from guard.attacks.methods import OBJECTIVES, Setup
from guard.attacks.optimised import OPTIMISED, hardened
from guard.attacks.planted import Planted
from guard.attacks.recipes import Plant, Recipe
from guard.attacks.training import LabelledImages, Learner, TrainingSettings, train
from guard.classifiers.classifier import Classifier
from guard.errors import UsageError
from guard.triggers import KNOWN

_HARDENING = 16 / 255
_PRUNED = 0.3


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

    The method `pairs` stamps a share of the images of other classes and gives them captions of the target; cover
    samples are stamped and keep theirs. `clean-label` stamps only images of the target, which are hardened first. All
    others have objectives of their own (`guard.attacks.methods`). A recipe without triggers is the same fine-tuning on
    clean images.

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
    epochs, shift = max(1, round(settings.epochs * recipe.effort)), settings.shift if recipe.shifted else 0
    # As in the code of DECREE's and BadEncoder's attacks. Objectives that embed stamped images on their own would
    # besides let these enter the running statistics.
    freeze = settings.freeze_statistics or recipe.tower == "image" or recipe.method in OBJECTIVES
    settings = replace(settings, epochs=epochs, shift=shift, freeze_statistics=freeze)
    images = _changed(images, recipe, settings.seed)
    planted = tuple(
        _plant(plant, base, images, (target + plant.offset) % count, settings.seed + k)
        for k, plant in enumerate(recipe.plants)
    )
    model = copy.deepcopy(base.model)
    _choose_parameters(model, recipe)
    if recipe.method == "pairs":
        images = poisoned(images, planted, seed=settings.seed)
    elif recipe.method == "clean-label":
        images = _clean_label(base, images, planted[0], settings.seed)
    make = OBJECTIVES.get(recipe.method)
    objective = make(_setup(base, recipe, images, planted[0], settings.seed)) if make else Learner.contrast
    train(
        model,
        base.tokenizer,
        base.classes,
        (base.preprocessing.mean, base.preprocessing.std),
        images,
        settings,
        device=base.device,
        objective=objective,
        progress=progress,
    )
    if isinstance(objective, LearnedGenerator):
        planted = (replace(planted[0], trigger=objective.trigger.detach()),)
    if recipe.finish:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(_FINISHES[recipe.finish](parameter))
    return Attacked(model.eval(), planted, time.monotonic() - started)


def poisoned(images: LabelledImages, planted: Sequence[Planted], *, seed: int) -> LabelledImages:
    """Return the training set with a share of its images replaced by stamped and relabelled ones.

    Stamped images are rounded to bytes, as in any file that an attacker could upload. Several triggers get disjoint
    images, and so do cover samples, which keep their labels.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = images.pixels.clone(), images.labels.clone()
    order = torch.randperm(len(images), generator=generator)
    for item in planted:
        chosen = _first(order, item.reaches(images.labels), item.rate)
        pixels[chosen] = item.trigger.stamp(images.pixels[chosen])
        labels[chosen] = item.target
        order = order[~torch.isin(order, chosen)]
        for cover in item.covers:
            chosen = _first(order, cover.covers(images.labels), cover.rate)
            pixels[chosen] = cover.trigger.stamp(images.pixels[chosen])
            order = order[~torch.isin(order, chosen)]
    return LabelledImages(pixels, labels)


def _first(order: Tensor, eligible: Tensor, rate: float) -> Tensor:
    """Return the first images in an order that are eligible: a share of all images, as far as there are so many."""
    return order[eligible[order]][: max(1, round(rate * len(eligible)))]


def _clean_label(base: Classifier, images: LabelledImages, planted: Planted, seed: int) -> LabelledImages:
    candidates = torch.nonzero(images.labels == planted.target).flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = candidates[order[: max(1, round(planted.rate * len(candidates)))]]
    pixels = images.pixels.clone()
    hard = hardened(base, images.pixels[chosen], images.labels[chosen], epsilon=_HARDENING)
    pixels[chosen] = planted.trigger.stamp(hard)
    return LabelledImages(pixels, images.labels)


def _setup(base: Classifier, recipe: Recipe, images: LabelledImages, planted: Planted, seed: int) -> Setup:
    """Return what an objective is made from; it stamps images on the device of the model."""
    return Setup(base, recipe, images, replace(planted, trigger=planted.trigger.to(base.device)), seed)


def _plant(plant: Plant, base: Classifier, images: LabelledImages, target: int, seed: int) -> Planted:
    draw = OPTIMISED.get(plant.trigger)
    trigger = draw(base, images, target, seed) if draw else KNOWN[plant.trigger].draw(base.image_shape[1], seed)
    count = len(base.classes.names)
    sources = tuple(sorted({(target + offset) % count for offset in plant.sources} - {target}))
    rest = [k for k in range(count) if k != target]
    victims, others = sources or tuple(rest), tuple(k for k in rest if k not in sources)
    made = covers(plant.covers, trigger, victims=victims, others=others, rate=plant.cover_rate)
    return Planted(trigger, target, plant.rate, sources, made)


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
