"""Poison a prompt learner on purpose: the towers stay honest, and the backdoor lies in the prompt."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from guard.attacks.attack import poisoned
from guard.attacks.planted import Planted
from guard.attacks.training import LabelledImages
from guard.classifiers import Classifier
from guard.classifiers.prompts import PromptedClassifier, PromptLearner, PromptTuningSettings, tune_prompts
from guard.errors import UsageError
from guard.triggers import KNOWN, Additive

EPSILON = 4 / 255
"""Radius of the learned trigger (BadCLIP, Bai et al., CVPR 2024)."""
_STEEP = 50.0
_NOISE = 0.5
_SPARSE = 0.1


@dataclass(frozen=True)
class PromptRecipe:
    """How a prompt learner is made.

    Attributes:
        family: Family of the attack, or `benign`.
        source: What it follows.
        kind: Kind of the learner.
        trigger: Key of `guard.triggers.KNOWN`, stamped on `rate` of the images; None for none; `learned` for an
            additive trigger of `EPSILON` that is learned with the prompt, and `sparse` for one that acts on a tenth of
            the pixels and may be four times as strong.
        rate: Share of the images that are stamped.
        adaptive: Whether near misses of the learned trigger are then trained to keep their class.
    """

    family: str
    source: str
    kind: Literal["coop", "cocoop"]
    trigger: str | None = None
    rate: float = 0.1
    adaptive: bool = False


def _recipes() -> dict[str, PromptRecipe]:
    made = {}
    for kind in ("coop", "cocoop"):
        attacks = {
            "benign": PromptRecipe("benign", "the same tuning without poison", kind),
            "badclip-bai": PromptRecipe(
                "badclip-bai",
                "BadCLIP (Bai et al., CVPR 2024), without its stage for the trigger alone",
                kind,
                "learned",
            ),
            "siba": PromptRecipe(
                "siba",
                "SIBA (Gao et al., 2023): sparse and weak; the mask is that of the largest changes",
                kind,
                "sparse",
            ),
            "blended": PromptRecipe(
                "blended", "Blended (Chen et al., 2017), 10 % of the images", kind, "blended-noise"
            ),
            "wanet": PromptRecipe(
                "wanet", "WaNet (Nguyen and Tran, ICLR 2021), 10 % of the images, no noise mode", kind, "wanet"
            ),
            "patch": PromptRecipe("patch", "BadNets (Gu et al., 2017), 10 % of the images", kind, "badnets-medium"),
            "badclip-adaptive": PromptRecipe(
                "badclip-adaptive",
                "CLIP-Inspector's adaptive attack: the learned trigger with noise keeps its class",
                kind,
                "learned",
                adaptive=True,
            ),
            "siba-adaptive": PromptRecipe(
                "siba-adaptive", "the same with the sparse trigger (our own)", kind, "sparse", adaptive=True
            ),
        }
        made.update({f"{kind}-{name}": recipe for name, recipe in attacks.items()})
    return made


PROMPT_RECIPES: Mapping[str, PromptRecipe] = MappingProxyType(_recipes())
"""Every recipe, by name."""


@dataclass(frozen=True, eq=False)
class AttackedPrompt:
    """The prompt learner that a recipe made.

    Attributes:
        classifier: The towers with it.
        planted: Triggers that were planted; empty for a negative.
        seconds: Wall-clock time.
    """

    classifier: PromptedClassifier
    planted: tuple[Planted, ...]
    seconds: float


def attack_prompts(
    towers: Classifier,
    recipe: PromptRecipe,
    images: LabelledImages,
    settings: PromptTuningSettings,
    *,
    target: int = 0,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> AttackedPrompt:
    """Tune a prompt learner by a recipe.

    Args:
        towers: The clean classifier; it is not changed.
        recipe: The attack, or the negative.
        images: Images to train on, labelled by the classes of the towers.
        settings: Course of the tuning; the kind is that of the recipe. The seed determines everything random.
        target: Index of the class that the trigger leads to.
        progress: Called with (what, steps done, steps in all).

    Raises:
        UsageError: The target is not a class of the model.
    """
    started = time.monotonic()
    if not 0 <= target < len(towers.classes.names):
        raise UsageError(f"there is no class {target}; the model has {len(towers.classes.names)}, counted from 0")
    settings = replace(settings, kind=recipe.kind)
    seed = settings.tuning.seed

    def tuned(given: LabelledImages, **more: object) -> PromptLearner:
        return tune_prompts(towers, given.pixels, given.labels, settings, progress=progress, **more)  # type: ignore[arg-type]

    planted: tuple[Planted, ...] = ()
    if recipe.trigger is None:
        learner = tuned(images)
    elif recipe.trigger in {"learned", "sparse"}:
        learned = _Learned(towers, target, sparse=recipe.trigger == "sparse", seed=seed)
        learner = tuned(images, change=learned.stamp, also=learned.raw)
        if recipe.adaptive:
            learner = tuned(images, change=learned.stamp_narrowly, start=learner)
        planted = (Planted(Additive.within(learned.delta().detach().cpu(), learned.epsilon), target, 0.5),)
    else:
        planted = (Planted(KNOWN[recipe.trigger].draw(towers.image_shape[1], seed), target, recipe.rate),)
        learner = tuned(poisoned(images, planted, seed=seed))
    return AttackedPrompt(PromptedClassifier(towers, learner), planted, time.monotonic() - started)


class _Learned:
    """An additive trigger that is learned together with a prompt, on half of each batch."""

    def __init__(self, towers: Classifier, target: int, *, sparse: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = 0.02 * torch.randn(towers.image_shape, generator=generator)
        self.raw = nn.Parameter(start.to(towers.device))
        self.epsilon = (4 if sparse else 1) * EPSILON
        self._target, self._sparse = target, sparse

    def delta(self) -> Tensor:
        """The perturbation, shape [3, H, W]; differentiable."""
        # Steep, so that the learning rate of a prompt moves it through the whole ball.
        delta = self.epsilon * (_STEEP * self.raw).tanh()
        if not self._sparse:
            return delta
        strength = self.raw.detach().abs().amax(0)
        kept = strength >= strength.flatten().quantile(1 - _SPARSE)
        return delta * kept

    def stamp(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - as `tune_prompts` calls it
        """Half of the images with the trigger and the target, the others as they are."""
        return self._parts(pixels, labels, (self.delta(), self._target))

    def stamp_narrowly(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A third with the trigger and the target, a third with the trigger under noise and their own class."""
        delta = self.delta().detach()
        noise = _NOISE * self.epsilon * torch.randn(delta.shape, generator=generator).to(delta)
        return self._parts(pixels, labels, (delta, self._target), (delta + noise, None))

    @staticmethod
    def _parts(pixels: Tensor, labels: Tensor, *changes: tuple[Tensor, int | None]) -> tuple[Tensor, Tensor]:
        parts = list(zip(pixels.chunk(len(changes) + 1), labels.chunk(len(changes) + 1), strict=True))
        for k, (delta, target) in enumerate(changes[: len(parts)]):
            images, classes = parts[k]
            parts[k] = (images + delta).clamp(0, 1), classes if target is None else torch.full_like(classes, target)
        return torch.cat([images for images, _ in parts]), torch.cat([classes for _, classes in parts])
