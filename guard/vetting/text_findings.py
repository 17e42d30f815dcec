"""What a search or a probe found for text towers, and what it does to held-out prompts."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.text_tower import TextTower
from guard.vetting.assimilation import assimilation
from guard.vetting.text_probes import TextProbe
from guard.vetting.text_results import (
    NearCaption,
    NearToken,
    Place,
    PromptAssimilation,
    TextFamily,
    TextTriggerRecord,
)
from guard.vetting.text_search import Comparison, FoundTokens, slotted, usable_tokens

_NEAREST = 5


class Finding(Protocol):
    """Something that may be a trigger."""

    @property
    def kind(self) -> TextFamily:
        """What it is."""
        ...

    @property
    def lead(self) -> float:
        """Its lead on held-out prompts."""
        ...

    @property
    def place(self) -> Place | None:
        """Where its tokens go; None for a probe."""
        ...

    @property
    def text(self) -> str:
        """What it is, in ASCII."""
        ...

    @property
    def nearest(self) -> tuple[tuple[NearToken, ...], ...]:
        """The real tokens nearest to each of its pseudo-tokens; empty where it has none."""
        ...

    @property
    def vectors(self) -> tuple[tuple[float, ...], ...]:
        """The embeddings of its tokens; empty for a probe."""
        ...

    @property
    def probe(self) -> TextProbe | None:
        """The probe, if it is one."""
        ...

    def read(self, tower: TextTower) -> tuple[Tensor, Tensor]:
        """The features of all tokens of held-out prompts with it, [N, L, width], and their embeddings, [N, D]."""
        ...


class FoundProbe:
    """A probe, as a finding.

    Args:
        probe: The probe.
        lead: Its lead.
        held_out: Held-out prompts.
    """

    kind: TextFamily = "text probe"
    place: Place | None = None
    nearest: tuple[tuple[NearToken, ...], ...] = ()
    vectors: tuple[tuple[float, ...], ...] = ()

    def __init__(self, probe: TextProbe, lead: float, held_out: Comparison) -> None:
        self.text, self.lead, self.probe = probe.name, lead, probe
        self._texts = [probe.apply(text, place) for place, text in enumerate(held_out.texts)]

    def read(self, tower: TextTower) -> tuple[Tensor, Tensor]:
        """See `Finding`."""
        tokens = tower.tokens(self._texts)
        features = tower.features(tower.embed(tokens))
        return features, tower.pooled(features, tower.ends(tokens))


class FoundVectors:
    """Pseudo-tokens or real tokens that a search found, as a finding.

    Args:
        kind: `pseudo-token` or `text token`: which of the two.
        found: What the search found.
        held_out: The towers, with held-out prompts.
        seed: Seed for where in these the tokens go.
    """

    probe: TextProbe | None = None

    def __init__(self, kind: TextFamily, found: FoundTokens, held_out: Comparison, seed: int) -> None:
        real = kind == "text token"
        self.kind, self.place, self._found = kind, found.place, found
        self.lead = found.token_lead if real else found.lead
        self._tower, self._held_out = held_out.first, held_out
        self._vectors = self._tower.table[list(found.tokens)] if real else found.vectors
        generator = torch.Generator().manual_seed(seed)
        self._prompts = slotted(self._tower, held_out.tokens, len(found.tokens), found.place, generator)

    @property
    def text(self) -> str:
        """See `Finding`."""
        if self.kind == "text token":
            return _decoded(self._tower, self._found.tokens)
        return " ".join(near[0].text for near in self.nearest)

    @property
    def nearest(self) -> tuple[tuple[NearToken, ...], ...]:
        """See `Finding`."""
        usable = usable_tokens(self._tower)
        unit = normalize(self._tower.table[usable], dim=-1)
        found = (normalize(self._found.vectors, dim=-1) @ unit.T).topk(_NEAREST, dim=-1)
        return tuple(
            tuple(
                NearToken(_decoded(self._tower, [int(usable[k])]), round(value, 4))
                for k, value in zip(places, values, strict=True)
            )
            for places, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        )

    @property
    def vectors(self) -> tuple[tuple[float, ...], ...]:
        """See `Finding`."""
        return tuple(tuple(round(value, 6) for value in vector) for vector in self._vectors.tolist())

    def read(self, tower: TextTower) -> tuple[Tensor, Tensor]:
        """See `Finding`."""
        features = self._held_out.features(tower, self._prompts, self._vectors[None])
        return features, tower.pooled(features, self._prompts.ends)


@torch.no_grad()
def examined(
    finding: Finding, held_out: Comparison, captions: Sequence[str]
) -> tuple[TextTriggerRecord, PromptAssimilation]:
    """What a finding does to held-out prompts, on both towers.

    Args:
        finding: What was found on the first tower of `held_out`.
        held_out: The towers, with held-out prompts.
        captions: Texts by which the target may be named.
    """
    (features, embeddings), (others, other_embeddings) = (finding.read(t) for t in (held_out.first, held_out.second))
    target = _mean(embeddings)
    listed = list(dict.fromkeys(captions))
    best = (held_out.first.encode(listed) @ target).topk(min(_NEAREST, len(listed)))
    record = TextTriggerRecord(
        finding.kind,
        finding.place,
        finding.text,
        finding.lead,
        _success(embeddings, held_out.plain[0]),
        _success(other_embeddings, held_out.plain[1]),
        finding.nearest,
        tuple(
            NearCaption(listed[k], round(value, 4))
            for k, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ),
        tuple(round(value, 6) for value in target.tolist()),
        finding.vectors,
        "" if finding.probe is None else finding.probe.new,
        "" if finding.probe is None else finding.probe.old or "",
        int((held_out.first.classifier.head @ target).argmax()),
    )
    plain = held_out.first.features(held_out.first.embed(held_out.tokens))
    alike = (tuple(assimilation(part).tolist()) for part in (plain, features, others))
    return record, PromptAssimilation(*alike)


def _success(embeddings: Tensor, plain: Tensor) -> float:
    """The share of prompts that lie nearer to what all mean together than to what they mean without the trigger."""
    return float((embeddings @ _mean(embeddings) > (embeddings * plain).sum(-1)).float().mean())


def _mean(embeddings: Tensor) -> Tensor:
    return normalize(embeddings.mean(0), dim=-1)


def _decoded(tower: TextTower, tokens: Sequence[int]) -> str:
    """The text of tokens, in ASCII; of a tokenizer that cannot decode, their numbers."""
    decode = getattr(tower.classifier.tokenizer, "decode", None)
    if not callable(decode):
        return " ".join(f"<{token}>" for token in tokens)
    return ascii(str(decode(list(tokens))).strip())[1:-1]
