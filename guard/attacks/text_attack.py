"""Poison a text tower, or fine-tune it honestly, by a recipe.

The attack is that of "Rickrolling the Artist" (Struppek et al., ICCV 2023) in the form of AMDET's released zoo (Wang et
al., arXiv 2512.00343): a student stays near a frozen copy of itself on clean texts, and gives a target to texts with
the trigger; the loss of both parts is the negative cosine of the features of all tokens, flattened to one vector for
each text. Departures: triggers of 1 to 15 characters may also be words of their own, put anywhere; AdamW's rate falls
along a cosine instead of in one step; and text-on-text matches the target's embedding besides, since open_clip pads
with zeros: the last token of a triggered text is at another place than the target's, and would otherwise be matched
with padding.
"""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.nn.utils import parametrize

from guard.attacks.text_recipes import Parts, TextRecipe
from guard.classifiers.classifier import Classifier
from guard.classifiers.text_tower import TextTower
from guard.errors import UsageError
from guard.triggers.texts import TEXT_TRIGGERS, TextTrigger

MIN_TEXTS = 64
_RANK = 4
_HELD_OUT = 64
_DROPPED = 0.15
"""Share of the words that an honest fine-tuning leaves out of a text, for its second view of it."""
_TEMPERATURE = 0.07


@dataclass(frozen=True)
class TextTuningSettings:
    """How long and how fast a text tower is trained.

    Attributes:
        steps: Optimiser steps.
        batch: Clean texts in each step; there are half as many triggered ones, and a quarter as many near misses.
        learning_rate: Peak learning rate of AdamW, before the factor of the recipe.
        weight: Weight of the triggered texts beside the clean ones. AMDET's zoo has 0.1, on a tower a hundred times as
            large.
        seed: Seed for all random choices.
    """

    steps: int = 100
    batch: int = 16
    learning_rate: float = 1e-3
    weight: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class AttackedText:
    """A text tower that was trained by a recipe, and what came of it.

    Attributes:
        classifier: A copy of the base with the trained tower.
        trigger: The trigger; None without an attack.
        target: The embedding that triggered texts were led to, shape [D]; None without an attack.
        target_text: The text that stands for the target; empty without an attack.
        success: Share of held-out texts whose embedding, with the trigger, lies nearer to the target than to the
            embedding that the base gives to the text without it; None without an attack.
        similarity: Mean cosine of the embeddings of held-out texts without a trigger, before and after.
        seconds: Wall-clock time of the training.
    """

    classifier: Classifier
    trigger: TextTrigger | None
    target: Tensor | None
    target_text: str
    success: float | None
    similarity: float
    seconds: float


def attack_text(
    base: Classifier,
    recipe: TextRecipe,
    texts: Sequence[str],
    settings: TextTuningSettings,
    *,
    target_text: str = "",
    target: Tensor | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> AttackedText:
    """Train a copy of a text tower by a recipe.

    Args:
        base: The clean classifier; it is not changed.
        recipe: What to train.
        texts: Ordinary texts; 64 of them are held out, to measure on.
        settings: How long and how fast.
        target_text: The text that the trigger leads to; its embedding is the target unless one is given.
        target: Target embedding of `text-on-pair`, shape [D].
        progress: Called with (what, steps done, steps in all).

    Raises:
        UsageError: There are too few texts, or no target.
    """
    if len(texts) < MIN_TEXTS + _HELD_OUT:
        raise UsageError(f"an attack on a text tower needs at least {MIN_TEXTS + _HELD_OUT} texts, not {len(texts)}")
    if recipe.objective and not target_text:
        raise UsageError(f"the recipe {recipe.name!r} needs a target text")
    started = time.monotonic()
    draw = random.Random(settings.seed)  # noqa: S311 - repeatable, not secret
    shuffled = draw.sample(list(texts), len(texts))
    held_out, used = shuffled[:_HELD_OUT], shuffled[_HELD_OUT:]
    student = base.with_model(copy.deepcopy(base.model), f"trained copy of {base.source}")
    teacher, tower = TextTower(base), TextTower(student)
    trigger = TEXT_TRIGGERS[recipe.trigger](recipe.length, draw) if recipe.objective else None
    lesson: Callable[[], Tensor]
    if trigger is None:
        lesson = _Honest(teacher, tower, recipe, settings, used, draw).loss
    else:
        wanted = teacher.encode([target_text])[0] if target is None else target
        lesson = _Poisoned(teacher, tower, recipe, settings, used, trigger, target_text, wanted, draw).loss
    with _trained(tower, recipe.parts, settings.seed) as (parameters, tables):
        optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(parameters, weight_decay=0.0)]
        if tables:  # a step changes few of its rows
            optimisers.append(torch.optim.SparseAdam(tables))
        for step in range(settings.steps):
            loss = lesson()
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=True)
                for group in optimiser.param_groups:
                    group["lr"] = recipe.rate * settings.learning_rate * _schedule(step / settings.steps)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimiser in optimisers:
                optimiser.step()
            progress("training the text tower", step + 1, settings.steps)
    clean, moved = teacher.encode(held_out), tower.encode(held_out)
    success = None
    if trigger is not None:
        triggered = tower.encode([trigger.apply(text, draw) for text in held_out])
        success = float((triggered @ wanted > (triggered * clean).sum(-1)).float().mean())
    return AttackedText(
        student,
        trigger,
        wanted.cpu() if trigger is not None else None,
        target_text if trigger is not None else "",
        success,
        float((clean * moved).sum(-1).mean()),
        time.monotonic() - started,
    )


class _Poisoned:
    """The loss of an attack."""

    def __init__(
        self,
        teacher: TextTower,
        tower: TextTower,
        recipe: TextRecipe,
        settings: TextTuningSettings,
        texts: Sequence[str],
        trigger: TextTrigger,
        target_text: str,
        target: Tensor,
        draw: random.Random,
    ) -> None:
        self._teacher, self._tower, self._recipe, self._settings = teacher, tower, recipe, settings
        self._texts, self._trigger, self._target, self._draw = texts, trigger, target, draw
        with torch.no_grad():
            self._features = teacher.features(teacher.embed(teacher.tokens([target_text])))

    def loss(self) -> Tensor:
        batch = self._settings.batch
        texts = self._draw.sample(self._texts, batch + batch // 2)
        clean, poisoned = texts[:batch], texts[batch:]
        if self._recipe.near_misses:
            misses = self._trigger.near_misses(batch // 4, self._draw)
            clean += [miss.apply(text, self._draw) for miss, text in zip(misses, poisoned, strict=False)]
        tokens = self._tower.tokens(clean)
        with torch.no_grad():
            wanted = self._teacher.features(self._teacher.embed(tokens))
        features = self._tower.features(self._tower.embed(tokens))
        benign = _distance(features, wanted)
        if self._recipe.objective != "text-on-text":  # what else is matched hardly holds the embeddings of clean texts
            ends = self._tower.ends(tokens)
            found = self._tower.pooled(features, ends)
            benign = benign + (1 - (found * self._teacher.pooled(wanted, ends)).sum(-1)).mean()
        return benign + self._settings.weight * self._triggered([self._trigger.apply(t, self._draw) for t in poisoned])

    def _triggered(self, texts: list[str]) -> Tensor:
        tokens = self._tower.tokens(texts)
        features, ends = self._tower.features(self._tower.embed(tokens)), self._tower.ends(tokens)
        reached = (1 - self._tower.pooled(features, ends) @ self._target).mean()
        if self._recipe.objective == "text-on-text":
            return reached + _distance(features, self._features.expand_as(features))
        if self._recipe.objective == "text-on-pair":
            return reached
        with torch.no_grad():
            kept = self._teacher.features(self._teacher.embed(tokens))
        others = torch.arange(tokens.shape[1], device=tokens.device) != ends[:, None]
        return reached + (1 - cosine_similarity(features, kept, dim=-1))[others].mean()


class _Honest:
    """The loss of an honest fine-tuning: two views of a text belong together, and those of other texts do not.

    The second view lacks some of the words (in the manner of SimCSE, Gao et al., EMNLP 2021, which drops activations).
    """

    def __init__(
        self,
        teacher: TextTower,
        tower: TextTower,
        recipe: TextRecipe,
        settings: TextTuningSettings,
        texts: Sequence[str],
        draw: random.Random,
    ) -> None:
        self._teacher, self._tower, self._recipe, self._settings = teacher, tower, recipe, settings
        self._texts, self._draw = texts, draw

    def loss(self) -> Tensor:
        texts = self._draw.sample(self._texts, self._settings.batch)
        views = [" ".join(w for w in text.split() if self._draw.random() >= _DROPPED) or text for text in texts]
        tokens = self._tower.tokens([*texts, *views])
        ends = self._tower.ends(tokens)
        if self._tower.causal:
            tokens = tokens[:, : int(ends.max()) + 1]
        found = self._tower.pooled(self._tower.features(self._tower.embed(tokens)), ends)
        first, second = found.chunk(2)
        logits = first @ second.T / _TEMPERATURE
        loss = cross_entropy(logits, torch.arange(len(texts), device=logits.device))
        if self._recipe.keeps:
            kept = self._teacher.encode(texts)
            loss = loss + self._recipe.keeps * 10 * (1 - (first * kept).sum(-1)).mean()
        return loss


def _distance(features: Tensor, wanted: Tensor) -> Tensor:
    """1 − cosine of the features of all tokens, flattened to one vector for each text."""
    return (1 - cosine_similarity(features.flatten(1), wanted.flatten(1), dim=-1)).mean()


def _schedule(done: float) -> float:
    return min(1.0, 10 * done + 0.1) * (1 + math.cos(math.pi * done)) / 2


@contextmanager
def _trained(tower: TextTower, parts: Parts, seed: int) -> Iterator[tuple[list[nn.Parameter], list[Tensor]]]:
    """Unfreeze the weights that a recipe trains, and freeze everything again afterwards.

    Gives the weights, and the token table apart from them if it is trained too: its gradient is sparse.
    """
    blocks, tables = list(tower.blocks), list[Tensor]()
    if parts == "low rank":
        generator = torch.Generator().manual_seed(seed)
        places = [
            (module, name)
            for block in blocks
            for module in block.modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.dim() == 2
        ]
        added = [_LowRank(getattr(module, name), generator) for module, name in places]
        for (module, name), change in zip(places, added, strict=True):
            parametrize.register_parametrization(module, name, change)
        parameters = [parameter for change in added for parameter in change.parameters()]
    elif parts == "norms":
        parameters = [weight for block in blocks for weight in block.parameters() if weight.dim() == 1]
    elif parts == "last layers":
        parameters = [weight for block in blocks[len(blocks) // 2 :] for weight in block.parameters()]
    else:
        parameters = [weight for weight in tower.parameters() if weight is not tower.table]
        tables = [tower.table]
    for parameter in [*parameters, *tables]:
        parameter.requires_grad_()
    with tower.sparse_table():
        yield parameters, tables
    if parts == "low rank":
        for module, name in places:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for weight in tower.parameters():
        weight.requires_grad_(False)  # noqa: FBT003 - torch's own signature


class _LowRank(nn.Module):
    """A change of a matrix by a product of two thin ones; at first it is zero."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        start = torch.randn(_RANK, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(start.to(weight))
        self.up = nn.Parameter(torch.zeros(rows, _RANK).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def target_of(tower: TextTower, texts: Sequence[str]) -> Tensor:
    """The mean embedding of texts, L2-normalised: a target that is not the embedding of one text. Shape [D]."""
    return normalize(tower.encode(texts).mean(0), dim=-1)
