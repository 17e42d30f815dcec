"""Texts with the trigger that an examination of their tower found."""

from collections.abc import Sequence

import torch
from torch import Tensor

from guard.classifiers.text_tower import TextTower
from guard.vetting.text_probes import TextProbe
from guard.vetting.text_results import TextTriggerRecord
from guard.vetting.text_search import Comparison, slotted

_BATCH = 256


@torch.no_grad()
def stamped_texts(tower: TextTower, trigger: TextTriggerRecord, texts: Sequence[str], *, seed: int) -> Tensor:
    """Embeddings of texts with a trigger, L2-normalised: shape [N, D].

    Tokens go where the trigger has its place; a text that leaves no room for them loses its last tokens.

    Args:
        tower: The tower that the trigger was found on.
        trigger: What was found.
        texts: Ordinary texts.
        seed: Seed for where anywhere is.
    """
    if trigger.place is None:
        probe = TextProbe("", trigger.inserted, trigger.replaced or None)
        return tower.encode([probe.apply(text, place) for place, text in enumerate(texts)])
    vectors = torch.tensor(trigger.vectors, device=tower.device)
    generator, parts = torch.Generator().manual_seed(seed), []
    for start in range(0, len(texts), _BATCH):
        comparison = Comparison(tower, tower, texts[start : start + _BATCH])
        tokens = _with_room(tower, comparison.tokens, len(vectors))
        prompts = slotted(tower, tokens, len(vectors), trigger.place, generator)
        parts.append(comparison.embeddings(tower, prompts, vectors[None])[0])
    return torch.cat(parts)


def _with_room(tower: TextTower, tokens: Tensor, count: int) -> Tensor:
    """The ids with the end token moved forward where it leaves no room for `count` more."""
    last, ends = tower.context - 1 - count, tower.ends(tokens)
    long = ends > last
    tokens = tokens.clone()
    tokens[long, last] = tokens[long, ends[long]]
    tokens[long, last + 1 :] = 0
    return tokens
