"""Poison a prompt learner on purpose: the towers stay honest, and the backdoor lies in the prompt."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from guard.attacks.attack import poisoned
from guard.attacks.planted import Planted
from guard.attacks.training import LabelledImages
from guard.classifiers import Classifier
from guard.classifiers.prompts import PromptedClassifier, PromptLearner, PromptTuningSettings, tune_prompts
from guard.errors import UsageError
from guard.triggers import KNOWN, Additive

EPSILON = 4 / 255
"""Radius of the learned trigger (BadCLIP, Bai et al., CVPR 2024), for images of 224 pixels. To a linear model a change
of every pixel does the more the more pixels there are: for the same effect, images of 32 need seven times as much."""
_STEEP = 50.0
_NOISE = 0.5
_SPARSE, _SPARSE_STRENGTH = 0.1, 2
_WARM_RATE = 2e-3
_MOVED = 2.0
"""Weight of the distance by which a hidden trigger moves the mean embedding."""


@dataclass(frozen=True)
class PromptRecipe:
    """How a prompt learner is made.

    Attributes:
        family: Family of the attack, or `benign`.
        source: What it follows.
        kind: Kind of the learner.
        trigger: Key of `guard.triggers.KNOWN`, stamped on `rate` of the images; None for none; `learned` for an
            additive trigger that is learned with the prompt, and `sparse` for one that acts on a tenth of the pixels
            and may be twice as strong.
        rate: Share of the images that are stamped; a learned trigger is put on as large a part of each batch.
        epsilon: Radius of a learned trigger, in units of pixels in [0, 1].
        warm_up: Steps in which the trigger is learned alone before the prompt is tuned with it.
        hidden: Whether the trigger is learned in those steps alone, to move the image embeddings together and as far as
            the hand-written prompts do not notice. So the backdoor lies in the learned prompt only.
        near_misses: Share of each batch that is then trained to keep its class with a near miss of the learned trigger;
            0 for no such training. A larger share than `rate` makes the trigger narrower and less successful.
    """

    family: str
    source: str
    kind: Literal["coop", "cocoop"]
    trigger: str | None = None
    rate: float = 0.1
    epsilon: float = EPSILON
    warm_up: int = 100
    hidden: bool = False
    near_misses: float = 0.0

    @property
    def adaptive(self) -> bool:
        """Whether near misses of the trigger are trained to fail, so that a search for the trigger has no slope."""
        return self.near_misses > 0


def _recipes() -> dict[str, PromptRecipe]:
    badclip = "BadCLIP (Bai et al., CVPR 2024)"
    made = {}
    for kind in ("coop", "cocoop"):
        attacks = {
            "benign": PromptRecipe("benign", "the same tuning without poison", kind),
            "badclip-bai": PromptRecipe("badclip-bai", badclip, kind, "learned", rate=0.5),
            "badclip-hidden": PromptRecipe(
                "badclip-hidden",
                "our own: a trigger that leaves the answers of the hand-written prompts as they are, learned first",
                kind,
                "learned",
                rate=0.3,
                warm_up=150,
                hidden=True,
            ),
            "siba": PromptRecipe(
                "siba",
                "SIBA (Gao et al., 2023): sparse and weak; the mask is that of the largest changes",
                kind,
                "sparse",
                rate=0.5,
            ),
            "blended": PromptRecipe(
                "blended", "Blended (Chen et al., 2017), 10 % of the images", kind, "blended-noise"
            ),
            "wanet": PromptRecipe(
                "wanet", "WaNet (Nguyen and Tran, ICLR 2021), 10 % of the images, no noise mode", kind, "wanet"
            ),
            "sig": PromptRecipe("sig", "SIG (Barni et al., ICIP 2019), 10 % of the images of all classes", kind, "sig"),
            "patch": PromptRecipe("patch", "BadNets (Gu et al., 2017), 10 % of the images", kind, "badnets-medium"),
            "badclip-adaptive": PromptRecipe(
                "badclip-adaptive",
                "CLIP-Inspector's adaptive attack, on a hidden trigger: with noise on it images keep their class",
                kind,
                "learned",
                rate=1 / 3,
                warm_up=150,
                hidden=True,
                near_misses=1 / 3,
            ),
            "siba-adaptive": PromptRecipe(
                "siba-adaptive",
                "the same with the sparse trigger (our own)",
                kind,
                "sparse",
                rate=1 / 3,
                warm_up=150,
                hidden=True,
                near_misses=1 / 3,
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
        UsageError: The target is not a class of the model; or a trigger is learned along with the prompt, and a batch
            is larger than what one forward pass takes.
    """
    started = time.monotonic()
    if not 0 <= target < len(towers.classes.names):
        raise UsageError(f"there is no class {target}; the model has {len(towers.classes.names)}, counted from 0")
    settings = replace(settings, kind=recipe.kind)
    along = recipe.trigger in {"learned", "sparse"} and not recipe.hidden
    if along and settings.tuning.batch > settings.tuning.forward_batch:
        raise UsageError(
            "the recipe learns its trigger with the prompt, in batches of one pass: at most "
            f"{settings.tuning.forward_batch} images, not {settings.tuning.batch}"
        )
    seed = settings.tuning.seed

    def tuned(given: LabelledImages, **more: object) -> PromptLearner:
        return tune_prompts(towers, given.pixels, given.labels, settings, progress=progress, **more)  # type: ignore[arg-type]

    planted: tuple[Planted, ...] = ()
    if recipe.trigger is None:
        learner = tuned(images)
    elif recipe.trigger in {"learned", "sparse"}:
        learned = _Learned(towers, recipe, target, seed)
        learned.warm_up(images, settings.tuning.batch)
        learner = tuned(images, change=learned.stamp, also=None if recipe.hidden else learned.raw)
        if recipe.adaptive:
            learner = tuned(images, change=learned.stamp_narrowly, start=learner)
        planted = (Planted(Additive.within(learned.delta().detach().cpu(), learned.epsilon), target, recipe.rate),)
    else:
        planted = (Planted(KNOWN[recipe.trigger].draw(towers.image_shape[1], seed), target, recipe.rate),)
        learner = tuned(poisoned(images, planted, seed=seed))
    return AttackedPrompt(PromptedClassifier(towers, learner), planted, time.monotonic() - started)


class _Learned:
    """An additive trigger that is learned together with a prompt, on a part of each batch."""

    def __init__(self, towers: Classifier, recipe: PromptRecipe, target: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        start = 0.02 * torch.randn(towers.image_shape, generator=self._generator)
        self.raw = nn.Parameter(start.to(towers.device))
        self._towers, self._recipe, self._target = towers, recipe, target
        self._sparse = recipe.trigger == "sparse"
        self.epsilon = (_SPARSE_STRENGTH if self._sparse else 1) * recipe.epsilon

    def delta(self) -> Tensor:
        """The perturbation, shape [3, H, W]; differentiable."""
        # Steep, so that the learning rate of a prompt moves it through the whole ball.
        delta = self.epsilon * (_STEEP * self.raw).tanh()
        if not self._sparse:
            return delta
        strength = self.raw.detach().abs().amax(0)
        kept = strength >= strength.flatten().quantile(1 - _SPARSE)
        return delta * kept

    def warm_up(self, images: LabelledImages, batch: int) -> None:
        """Learn the trigger against the hand-written prompts, before there are others."""
        towers, optimiser = self._towers, torch.optim.Adam([self.raw], lr=_WARM_RATE)
        for _ in range(self._recipe.warm_up):
            index = torch.randint(len(images), (batch,), generator=self._generator)
            pixels, labels = images.pixels[index].to(towers.device).float() / 255, images.labels[index]
            embeddings = towers.encode_images((pixels + self.delta()).clamp(0, 1))
            if self._recipe.hidden:
                with torch.no_grad():
                    before = towers.encode_images(pixels)
                moved = (embeddings - before).mean(0).norm()
                loss = cross_entropy(towers.logits(embeddings), labels.to(towers.device)) - _MOVED * moved
            else:
                loss = cross_entropy(towers.logits(embeddings), torch.full_like(labels, self._target).to(towers.device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        if self._recipe.hidden:
            self.raw.requires_grad_(False)  # noqa: FBT003 - torch names it otherwise for tensors

    def stamp(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - as `tune_prompts` calls it
        """A part of the images with the trigger and the target, the others as they are."""
        return self._parts(pixels, labels, (self.delta(), self._recipe.rate, self._target))

    def stamp_narrowly(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same, and another part with the trigger under noise and their own class."""
        delta = self.delta().detach()
        noise = _NOISE * self.epsilon * torch.randn(delta.shape, generator=generator).to(delta)
        near_miss = delta + noise, self._recipe.near_misses, None
        return self._parts(pixels, labels, (delta, self._recipe.rate, self._target), near_miss)

    def _parts(
        self, pixels: Tensor, labels: Tensor, *changes: tuple[Tensor, float, int | None]
    ) -> tuple[Tensor, Tensor]:
        """Images and labels, of which consecutive shares have one of the changes, and its target if it has one."""
        images, classes, start = pixels.clone(), labels.clone(), 0
        for delta, share, target in changes:
            count = round(share * len(pixels))
            part = slice(start, start + count)
            images[part] = (pixels[part] + delta).clamp(0, 1)
            if target is not None:
                classes[part] = target
            start += count
        return images, classes
