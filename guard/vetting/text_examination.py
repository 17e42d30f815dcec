"""Examine the text tower of a classifier for backdoors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts import PromptedClassifier
from guard.classifiers.text_tower import TextTower
from guard.errors import UsageError
from guard.vetting.budgets import BUDGETS, Budget
from guard.vetting.cache import SearchCache
from guard.vetting.drift import drift
from guard.vetting.nulls import text_null
from guard.vetting.prompts import MIN_PROMPTS, check_prompts, ordinary_prompts
from guard.vetting.results import ReferenceKind, ReferenceModel
from guard.vetting.text_findings import Finding, FoundProbe, FoundVectors, examined
from guard.vetting.text_memory import TextMemory
from guard.vetting.text_probes import listed_text_probes, probe_leads
from guard.vetting.text_reference import TEXT_REFERENCE, derive_text_reference
from guard.vetting.text_results import TEXT_BUDGETS, Place, TextFamily, TextSearchSettings, TextStatistic, TextVetting
from guard.vetting.text_search import Comparison, FoundTokens, search, usable_tokens
from guard.vetting.text_verdict import judge_text

SHAPES: tuple[tuple[int, Place], ...] = ((1, "anywhere"), (3, "end"))
"""Number and place of the tokens that are searched for. One token finds homoglyphs, three find words that the tokenizer
splits; what works anywhere in a prompt works at its end too."""
_PROBED, _PROMPTS, _ROOM, _TRIED = 12, 2000, 4, 8
_PREFERRED = 0.3
"""Lead by which pseudo-tokens must exceed real tokens to be shown in their place: they lead further on any tower, and
to a place that is less like the attacker's target."""
_DESCRIPTIONS: dict[TextFamily, str] = {
    "pseudo-token": "largest lead of pseudo-tokens on held-out prompts",
    "text token": "largest lead of real tokens on held-out prompts",
    "text probe": "largest lead of a listed probe",
    "text drift": "share of the drift of ordinary prompts that lies along one direction",
}
Progress = Callable[[str, int, int], None]


def without_prompts(classifier: Classifier, base: Classifier | None) -> tuple[Classifier, Classifier | None]:
    """The suspect and the base as they are compared by their text towers, in which prompt learners change nothing.

    Raises:
        UsageError: The base is the suspect itself, has another text tower, or is what a prompt learner lies on.
    """
    towers = classifier.towers if isinstance(classifier, PromptedClassifier) else classifier
    if base is None:
        return towers, None
    other = base.towers if isinstance(base, PromptedClassifier) else base
    if towers is not classifier and towers.digest.root == other.digest.root:
        raise UsageError(
            "the prompt learner lies on the towers of the base, weight for weight, so that there is nothing to compare "
            "in the text tower; examine its image tower alone (--tower image)"
        )
    check_text_comparable(towers, other)
    return towers, other


def vet_text(
    classifier: Classifier,
    prompts: Sequence[str] = (),
    *,
    base: Classifier | None = None,
    budget: Budget = "standard",
    seed: int = 0,
    captions: Sequence[str] = (),
    cache: Path | None = None,
    progress: Progress = lambda *_: None,
) -> TextVetting:
    """Look for something that makes all prompts mean the same on this text tower and not on its reference model.

    In three stages, from cheap to dear: probes (forward passes), a search that names no target (pseudo-tokens, and from
    them real tokens), and the drift of prompts that carry nothing. Probes and search are also made with the two towers
    exchanged. What honest fine-tuning changes, it changes both ways; a trigger is there on one side only. The
    difference of the two is compared with that of honest fine-tunings.

    Args:
        classifier: The suspect. A prompt learner changes nothing in its text tower, which is examined without.
        prompts: Ordinary prompts, at least 96; by default guard's own (`ordinary_prompts`).
        base: A trusted model with a text tower of the same width, context and tokenizer, such as the checkpoint that
            the suspect was tuned from. Without one, a reference model is made from the suspect.
        budget: How much work to do.
        seed: Seed for all random choices.
        captions: Further texts by which the target may be named.
        cache: Folder in which finished searches are kept, so that an examination that is interrupted can go on; a
            reference model that is made from the suspect is made again. None to keep nothing.
        progress: Called with (what is done, steps done, steps in all).

    Raises:
        UsageError: There are too few prompts, or too few that leave room for a trigger; the base model is the suspect
            itself, or has another text tower; the budget is unknown.
        ModelError: The text tower is of a kind that guard cannot open.
    """
    if budget not in BUDGETS:
        raise UsageError(f"there is no budget {budget!r}; there are {', '.join(BUDGETS)}")
    started = time.monotonic()
    classifier, base = without_prompts(classifier, base)
    used = tuple(dict.fromkeys(prompts)) or ordinary_prompts(_PROMPTS, seed)
    check_prompts(used, "the list of prompts")
    settings = replace(TEXT_BUDGETS[budget], seed=seed)
    tower = TextTower(classifier)
    if base is not None:
        reference, passes = TextTower(base), 0
    else:
        derived, passes = derive_text_reference(classifier, used, replace(TEXT_REFERENCE, seed=seed), progress=progress)
        reference = TextTower(derived)
    kind: ReferenceKind = "derived" if base is None else "base"
    searched, held_out = _split(tower, used, settings)
    digests = classifier.digest.root, reference.classifier.digest.root
    memory = TextMemory(SearchCache(cache) if cache else None, [*digests, searched, held_out, asdict(settings)])
    probes = listed_text_probes()
    probed = memory.probes(
        [probe.name for probe in probes],
        lambda: probe_leads(tower, reference, searched[:_PROBED], probes, progress=progress),
    ).to(tower.device)
    suspect = _Direction(tower, reference, searched, held_out, probed, settings, memory, progress)
    swapped = _Direction(reference, tower, searched, held_out, -probed, settings, memory, progress)
    some = used[:_PROMPTS]
    trigger, assimilated = examined(suspect.strongest, suspect.held_out, (*some, *captions))
    embeddings, others = tower.encode(some), reference.encode(some)
    moved = drift(embeddings, others)
    values = {family: (lead, swapped.leads[family]) for family, lead in suspect.leads.items()}
    values["text drift"] = (moved.concentration, 0.0)
    statistics = tuple(_statistic(family, *pair, kind) for family, pair in values.items())
    passes += suspect.passes + swapped.passes + 4 * len(some) + 2 * _PROBED * (len(probed) + 1)
    agreement = float((embeddings * others).sum(-1).mean())
    return TextVetting(
        judge_text(statistics, trigger),
        statistics,
        trigger,
        assimilated,
        settings,
        (len(searched), len(held_out)),
        ReferenceModel(kind, None if base is None else base.digest.root, agreement, passes),
        str(classifier.device),
        time.monotonic() - started,
        passes,
    )


def check_text_comparable(classifier: Classifier, base: Classifier) -> None:
    """Make sure that the text towers of two classifiers can be compared token by token.

    Raises:
        UsageError: The base model is the classifier itself, or its text tower has another width, context or tokenizer.
    """
    if base.digest.root == classifier.digest.root:
        raise UsageError("the base model is the model itself; comparing a model with itself shows nothing")
    first, second = TextTower(classifier), TextTower(base)
    if first.table.shape != second.table.shape or first.context != second.context:
        raise UsageError("the text tower of the base model has another width, context or vocabulary than the model's")
    if base.digest.parts["tokenizer"] != classifier.digest.parts["tokenizer"]:
        raise UsageError("the base model has another tokenizer than the model, or other classes; give both the same")


def _split(tower: TextTower, prompts: Sequence[str], settings: TextSearchSettings) -> tuple[list[str], list[str]]:
    """Prompts to search on and prompts to measure on, of those that leave room for a trigger."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(prompts), generator=generator)[: _TRIED * settings.prompts].tolist()
    tokens = tower.tokens([prompts[k] for k in order])
    room = (tokens[:, -_ROOM:] == tokens[:, -1:]).all(1)
    fitting = [prompts[k] for k, fits in zip(order, room.tolist(), strict=True) if fits][: 2 * settings.prompts]
    if len(fitting) < MIN_PROMPTS // 2:
        raise UsageError(f"only {len(fitting)} of the prompts leave room for {_ROOM} more tokens; give shorter ones")
    half = len(fitting) // 2
    return fitting[:half], fitting[half:]


def _statistic(family: TextFamily, value: float, swapped: float, kind: ReferenceKind) -> TextStatistic:
    null = text_null(kind, family)
    p_value = None if null is None else null.p_value(value - swapped)
    described = "none" if null is None else f"{null.models} honest fine-tunings of small text towers (Student's t)"
    return TextStatistic(family, _DESCRIPTIONS[family], value, swapped, p_value, described)


class _Direction:
    """Everything that is searched for on one tower and against another.

    Args:
        first: The tower on which prompts are to agree.
        second: The other one.
        searched: Prompts to search on.
        held_out: Prompts to measure on.
        probed: The lead of each listed probe: shape [P].
        settings: How much work to do.
        memory: What was found already.
        progress: Called with (what, searches done, searches in all).
    """

    def __init__(
        self,
        first: TextTower,
        second: TextTower,
        searched: Sequence[str],
        held_out: Sequence[str],
        probed: Tensor,
        settings: TextSearchSettings,
        memory: TextMemory,
        progress: Progress,
    ) -> None:
        self.held_out = Comparison(first, second, held_out)
        self._probed = probed
        self.passes = 0
        comparison, usable = Comparison(first, second, searched), usable_tokens(first)
        self._found: list[FoundVectors] = []
        for k, (count, place) in enumerate(SHAPES):
            progress("text searches", k, len(SHAPES))

            def work(count: int = count, place: Place = place, k: int = k) -> tuple[FoundTokens, int]:
                before = comparison.passes + self.held_out.passes
                made = search(comparison, self.held_out, usable, count, place, settings, seed=settings.seed + k)
                return made, comparison.passes + self.held_out.passes - before

            found, passes = memory.search([first.classifier.digest.root, count, place], work)
            self.passes += passes
            for kind in ("text token", "pseudo-token"):
                self._found.append(FoundVectors(kind, found, self.held_out, settings.seed))
        progress("text searches", len(SHAPES), len(SHAPES))

    @property
    def leads(self) -> dict[TextFamily, float]:
        """The largest lead of each kind."""
        kinds: tuple[TextFamily, ...] = ("pseudo-token", "text token")
        leads = {kind: max(item.lead for item in self._found if item.kind == kind) for kind in kinds}
        return {**leads, "text probe": float(self._probed.max())}

    @property
    def strongest(self) -> Finding:
        """What has the largest lead of all; real tokens before pseudo-tokens that lead hardly further."""
        best = int(self._probed.argmax())
        probe = FoundProbe(listed_text_probes()[best], float(self._probed[best]), self.held_out)
        findings: list[Finding] = [*self._found, probe]
        return max(findings, key=lambda item: item.lead - _PREFERRED * (item.kind == "pseudo-token"))
