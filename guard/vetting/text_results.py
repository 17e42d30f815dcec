"""What the examination of a text tower finds. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from guard.vetting.budgets import Budget
from guard.vetting.results import ReferenceModel, Verdict

TextFamily = Literal["pseudo-token", "text token", "text probe", "text drift"]
"""What a statistic of a text tower is about."""
Place = Literal["start", "end", "anywhere"]
"""Where tokens are inserted: after the first token, before the last one, or anywhere between."""


@dataclass(frozen=True)
class TextSearchSettings:
    """How much work the examination of a text tower does.

    Attributes:
        prompts: Prompts that are searched on; as many are held out.
        batch: Prompts in each step.
        starts: Starts of each search, side by side.
        steps: Optimiser steps on the pseudo-tokens.
        learning_rate: Learning rate of Adam, in units of the size of a component of a token's embedding.
        rounds: Largest number of rounds of the search over real tokens.
        candidates: Tokens tried in each round.
        seed: Seed for all random choices.
    """

    prompts: int = 48
    batch: int = 12
    starts: int = 2
    steps: int = 30
    learning_rate: float = 0.3
    rounds: int = 6
    candidates: int = 24
    seed: int = 0


TEXT_BUDGETS: Mapping[Budget, TextSearchSettings] = MappingProxyType(
    {
        "quick": TextSearchSettings(steps=15, rounds=3),
        "standard": TextSearchSettings(),
        "thorough": TextSearchSettings(steps=80, starts=6, rounds=16, candidates=96, batch=16, prompts=96),
    }
)
"""The effort behind each budget that `guard vet --budget` accepts."""


@dataclass(frozen=True)
class TextStatistic:
    """One statistic of a text tower.

    Attributes:
        family: What it is about.
        description: What it measures.
        value: On the suspect against its reference model; larger is more suspicious.
        swapped: The same with the two exchanged: what any two towers that differ so much have; 0 where exchanging them
            changes nothing.
        p_value: How often an honest fine-tuning has as large a difference of the two; None without a null.
        null: Description of the null.
    """

    family: TextFamily
    description: str
    value: float
    swapped: float
    p_value: float | None
    null: str


@dataclass(frozen=True)
class NearToken:
    """A real token near a pseudo-token.

    Attributes:
        text: What it stands for, with characters outside ASCII escaped.
        cosine: Cosine between the two embeddings, in [−1, 1].
    """

    text: str
    cosine: float


@dataclass(frozen=True)
class NearCaption:
    """A prompt whose embedding lies near the target feature.

    Attributes:
        text: The prompt.
        cosine: Cosine between the two, in [−1, 1].
    """

    text: str
    cosine: float


@dataclass(frozen=True)
class TextTriggerRecord:
    """The strongest trigger that was found, measured on held-out prompts.

    Attributes:
        kind: `pseudo-token`, `text token` or `text probe`: what it is.
        place: Where its tokens are inserted; None for a probe.
        text: The real tokens or the probe, with characters outside ASCII escaped.
        lead: Its lead (`guard.vetting.text_search`), in (−2, 2).
        success: Share of held-out prompts that lie nearer to the target with the trigger than to themselves without it.
        reference_success: The same share on the reference model.
        nearest: For each pseudo-token the nearest real tokens, nearest first; empty for a probe.
        captions: The prompts nearest to the target feature without a trigger, nearest first.
        feature: The target feature, the mean embedding of held-out prompts with the trigger: unit vector of length D.
        vectors: The embeddings of its tokens, as they are put among those of a text: k vectors; empty for a probe.
        inserted: What a probe puts into a text; "" for tokens.
        replaced: The letter that a probe puts it in place of; "" where it is a word of its own.
        target: Index of the class whose embedding is nearest to the target feature.
    """

    kind: TextFamily
    place: Place | None
    text: str
    lead: float
    success: float
    reference_success: float
    nearest: tuple[tuple[NearToken, ...], ...]
    captions: tuple[NearCaption, ...]
    feature: tuple[float, ...]
    vectors: tuple[tuple[float, ...], ...] = ()
    inserted: str = ""
    replaced: str = ""
    target: int = 0


@dataclass(frozen=True)
class PromptAssimilation:
    """Assimilation of held-out prompts (`guard.vetting.assimilation`), one number for each, in [−1, 1].

    Attributes:
        plain: On the suspect, without the trigger.
        triggered: On the suspect, with the trigger that was found.
        reference: On the reference model, with it.
    """

    plain: tuple[float, ...]
    triggered: tuple[float, ...]
    reference: tuple[float, ...]


@dataclass(frozen=True)
class TextVetting:
    """How a text tower was examined, and with what result.

    Attributes:
        verdict: The conclusion about the text tower.
        statistics: What was measured.
        trigger: The strongest trigger found, whatever it is worth.
        assimilation: What it does to the tokens of held-out prompts.
        settings: How much work was done, with the seed.
        prompts: Number of prompts that were searched on, and that were held out.
        reference_model: The tower that the suspect's was compared with; its agreement is the mean cosine of the
            embeddings of held-out prompts.
        device: The torch device.
        seconds: Wall-clock time.
        passes: Number of prompts that went through text towers.
    """

    verdict: Verdict
    statistics: tuple[TextStatistic, ...]
    trigger: TextTriggerRecord
    assimilation: PromptAssimilation
    settings: TextSearchSettings
    prompts: tuple[int, int]
    reference_model: ReferenceModel
    device: str
    seconds: float
    passes: int
