"""A search for what makes all prompts mean the same on one text tower and not on another. It names no target.

It works on embeddings, the pooled features that are all that a CLIP classifier reads of a text, and so it also finds a
backdoor that leaves the other tokens alone. What is searched for are pseudo-tokens: a few vectors, no longer than the
embeddings of real tokens, that are put into every prompt as tokens are, with the positions that tokens have there. They
are then replaced by real tokens: the nearest ones first, and from there one token at a time, in the direction that the
gradient names (HotFlip, Ebrahimi et al., ACL 2018; the candidates are tried as in GCG, Zou et al., 2023).

The *gain* of something on a tower is the agreement of prompts with it, less that without it, as a share of what is
missing to full agreement. The *lead* is its gain on the first tower, less that on the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from guard.classifiers.text_tower import TextTower
from guard.vetting.assimilation import agreement
from guard.vetting.text_results import Place, TextSearchSettings

_CHUNK = 512
"""Prompts in one forward pass of the discrete search."""


@dataclass(frozen=True, eq=False)
class Slotted:
    """Prompts with room for inserted tokens.

    Attributes:
        tokens: Ids, 0 in the room: int64, shape [N, L].
        room: Where the room is: bool, shape [N, L], with the same number of places in each row.
        ends: Where each prompt is read: shape [N].
    """

    tokens: Tensor
    room: Tensor
    ends: Tensor


def usable_tokens(tower: TextTower) -> Tensor:
    """Ids of the tokens that may be inserted: all but CLIP's 256 single bytes and the two special ones at the end."""
    return torch.arange(256, len(tower.table) - 2, device=tower.device)


def slotted(tower: TextTower, tokens: Tensor, count: int, place: Place, generator: torch.Generator) -> Slotted:
    """Make room in prompts.

    Args:
        tower: Reads the prompts.
        tokens: Ids of prompts that leave room for `count` more tokens: shape [N, context].
        count: Number of tokens to insert.
        place: After the first token, before the last one, or anywhere between words.
        generator: Chooses where anywhere is; on the CPU.
    """
    ends = tower.ends(tokens)
    lengths = (tokens != tokens[:, -1:]).long().mul(torch.arange(tokens.shape[1], device=tokens.device)).amax(-1)
    last = torch.minimum(ends, lengths).clamp(min=1)
    drawn = torch.rand(len(tokens), generator=generator).to(tokens.device)
    share = {"start": torch.zeros_like(drawn), "end": torch.ones_like(drawn), "anywhere": drawn}[place]
    first = 1 + (share * (last - 1)).round().long()
    length = min(tower.context, int(ends.max()) + count + 1) if tower.causal else tower.context
    index = torch.arange(length, device=tokens.device).expand(len(tokens), -1)
    room = (index >= first[:, None]) & (index < first[:, None] + count)
    source = torch.where(index >= first[:, None] + count, index - count, index)
    moved = tokens.gather(1, source.clamp(0, tokens.shape[1] - 1)).masked_fill(room, 0)
    return Slotted(moved, room, tower.ends(moved))


class Comparison:
    """Two text towers on the same prompts.

    Args:
        first: The tower on which prompts are to agree.
        second: The tower on which they are not to; it has the same tokens, width and context.
        texts: Ordinary prompts, each short enough to leave room for the tokens that are inserted.
    """

    def __init__(self, first: TextTower, second: TextTower, texts: Sequence[str]) -> None:
        self.first, self.second = first, second
        self.texts = list(texts)
        self.tokens = first.tokens(self.texts)
        self.passes = 0

    @cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """The embeddings of all prompts as they are, on both towers: each of shape [N, D]."""
        self.passes += 2 * len(self.texts)
        return self.first.encode(self.texts), self.second.encode(self.texts)

    def embeddings(self, tower: TextTower, prompts: Slotted, vectors: Tensor) -> Tensor:
        """Embeddings of prompts with vectors in their room: shape [S, N, D]; arguments as for `features`."""
        starts, rows = len(vectors), len(prompts.tokens)
        features = self.features(tower, prompts, vectors)
        return tower.pooled(features, prompts.ends.repeat(starts)).view(starts, rows, -1)

    def features(self, tower: TextTower, prompts: Slotted, vectors: Tensor) -> Tensor:
        """Features of all tokens of prompts with vectors in their room: shape [S · N, L, width].

        Args:
            tower: Which of the two.
            prompts: N prompts with room for k tokens.
            vectors: Shape [S, k, width]: S things to insert.
        """
        starts, count, width = vectors.shape
        rows, length = prompts.tokens.shape
        hidden: Tensor = tower.embed(prompts.tokens).expand(starts, -1, -1, -1)
        added = vectors[:, None].expand(-1, rows, -1, -1).reshape(starts, rows * count, width)
        positions = tower.positions(length).expand(rows, -1, -1)[prompts.room]
        mask = prompts.room[..., None].expand(starts, -1, -1, width)
        hidden = hidden.masked_scatter(mask, added + positions)
        self.passes += starts * rows
        return tower.features(hidden.flatten(0, 1))

    def leads(self, prompts: Slotted, rows: Tensor, vectors: Tensor) -> Tensor:
        """The lead of each of S things to insert, measured on some of the prompts: shape [S].

        Args:
            prompts: Those prompts with room.
            rows: Their numbers among all prompts.
            vectors: Shape [S, k, width].
        """
        gains = []
        for tower, plain in zip((self.first, self.second), self.plain, strict=True):
            before = agreement(plain[rows])
            gains.append((agreement(self.embeddings(tower, prompts, vectors)) - before) / (1 - before).clamp(min=1e-3))
        return gains[0] - gains[1]


@dataclass(frozen=True, eq=False)
class FoundTokens:
    """What a search found for one number of tokens at one place.

    Attributes:
        place: Where the tokens go.
        vectors: The best pseudo-tokens: shape [k, width].
        lead: Their lead on prompts that the search did not use.
        tokens: The best real tokens: k ids.
        token_lead: Their lead on the same prompts.
    """

    place: Place
    vectors: Tensor
    lead: float
    tokens: tuple[int, ...]
    token_lead: float


def search(
    comparison: Comparison,
    held_out: Comparison,
    usable: Tensor,
    count: int,
    place: Place,
    settings: TextSearchSettings,
    *,
    seed: int,
) -> FoundTokens:
    """Search for pseudo-tokens and for real tokens with a large lead.

    Args:
        comparison: The towers, with the prompts to search on.
        held_out: The same towers, with the prompts to measure on.
        usable: Ids of the tokens that may be inserted.
        count: Number of tokens.
        place: Where they go.
        settings: How much work to do.
        seed: Seed for starts, batches and places.
    """
    generator = torch.Generator().manual_seed(seed)
    table = comparison.first.table
    # No longer than real tokens are: a vector of any length can draw all attention to itself on any tower.
    longest = table[usable].norm(dim=-1).quantile(0.99)
    starts = usable[torch.randint(len(usable), (settings.starts, count), generator=generator)]
    vectors = table[starts].detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([vectors], lr=float(settings.learning_rate * longest / table.shape[1] ** 0.5))
    for _ in range(settings.steps):
        prompts, rows = _drawn(comparison, count, place, settings.batch, generator)
        loss = -comparison.leads(prompts, rows, vectors).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            vectors.mul_((longest / vectors.norm(dim=-1, keepdim=True)).clamp(max=1))
    judged, rows = _drawn(comparison, count, place, min(len(comparison.texts), 2 * settings.batch), generator)
    with torch.no_grad():
        best = vectors.detach()[int(comparison.leads(judged, rows, vectors).argmax())]
    tokens = _real(comparison, usable, best, place, settings, generator)
    prompts, rows = _drawn(held_out, count, place, len(held_out.texts), generator)
    with torch.no_grad():
        leads = held_out.leads(prompts, rows, torch.stack([best, table[tokens]]))
    return FoundTokens(place, best, float(leads[0]), tuple(tokens.tolist()), float(leads[1]))


def _real(
    comparison: Comparison,
    usable: Tensor,
    vectors: Tensor,
    place: Place,
    settings: TextSearchSettings,
    generator: torch.Generator,
) -> Tensor:
    """Real tokens with a large lead, from pseudo-tokens: ids, shape [k]."""
    table = comparison.first.table
    choices = table[usable]
    unit = choices / choices.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    current = usable[(vectors @ unit.T).argmax(-1)]
    count = len(current)
    prompts, rows = _drawn(comparison, count, place, settings.batch, generator)
    best = -2.0
    for step in range(settings.rounds):
        place_of = vectors if step == 0 else table[current]  # at first, the pseudo-tokens' own gradient
        inserted = place_of.detach().clone()[None].requires_grad_()
        gradient = torch.autograd.grad(comparison.leads(prompts, rows, inserted).sum(), inserted)[0][0]
        promise = gradient @ choices.T  # shape [k, V]
        picked = promise.topk(settings.candidates // count, dim=-1).indices
        candidates = current.repeat(count * picked.shape[1] + 1, 1)
        for slot in range(count):
            candidates[1 + slot * picked.shape[1] : 1 + (slot + 1) * picked.shape[1], slot] = usable[picked[slot]]
        with torch.no_grad():
            parts = table[candidates].split(max(1, _CHUNK // len(rows)))
            leads = torch.cat([comparison.leads(prompts, rows, part) for part in parts])
        if float(leads.max()) <= best + 1e-4 and step > 1:
            break
        best, current = float(leads.max()), candidates[int(leads.argmax())]
    return current


def _drawn(
    comparison: Comparison, count: int, place: Place, batch: int, generator: torch.Generator
) -> tuple[Slotted, Tensor]:
    rows = torch.randperm(len(comparison.texts), generator=generator)[:batch].to(comparison.tokens.device)
    return slotted(comparison.first, comparison.tokens[rows], count, place, generator), rows
