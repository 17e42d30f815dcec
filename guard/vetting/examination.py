"""Examine a classifier for backdoors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import ImageError, UsageError
from guard.triggers import FAMILIES
from guard.vetting.agreement import CONFIRMATIONS, agreed
from guard.vetting.batches import halves
from guard.vetting.budgets import BUDGETS, Budget, DerivedReferenceSettings, Effort
from guard.vetting.cache import SearchCache
from guard.vetting.difference import difference
from guard.vetting.probes import Probe, listed_probes
from guard.vetting.probes import result as probe_result
from guard.vetting.race import RACED_CLASSES, Race
from guard.vetting.reconstruction import reconstruct_suspects
from guard.vetting.reference import FRESH_METHOD, derive_reference, fresh_prompts
from guard.vetting.reference import METHOD as REFERENCE_METHOD
from guard.vetting.results import FamilyResult, FoundTarget, ReferenceModel, Verdict, Vetting
from guard.vetting.searches import Searches
from guard.vetting.verdict import is_close, judge

MIN_IMAGES = 64
_CANDIDATES = 6
"""Number of classes that are inspected among many, besides those that they are compared with."""


def vet(
    classifier: Classifier,
    images: Tensor,
    *,
    base: Classifier | None = None,
    derive: bool = True,
    families: Sequence[str] = tuple(FAMILIES),
    budget: Budget = "standard",
    seed: int = 0,
    repeats: int | None = None,
    race: bool = True,
    probes: Sequence[Probe] | None = None,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Vetting:
    """Look for a class that triggers of limited strength reach too easily, reconstruct its trigger, and judge.

    Half of the images are searched on, and half are held out for the checks. Everything is measured against a reference
    model: the base model if there is one, otherwise one that is derived from the classifier itself. Fixed changes of
    images, the probes, are tried first. Then every family of triggers is inspected for every class; of more than
    `guard.vetting.race.RACED_CLASSES`, only for candidates, which the probes and a search that names no class hint at,
    and for some classes to compare them with. The triggers of classes that stand out are reconstructed and checked; the
    p-values, corrected for all classes, and the checks together give the verdict. Where the suspect's weights differ
    from those of the base as if by noise (`guard.vetting.difference`), `no evidence` becomes `inconclusive`.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W] at the classifier's resolution; unlabelled, at least 64.
        base: A trusted model with the same classes and input size, such as the checkpoint that the suspect was tuned
            from.
        derive: Whether to derive a reference model where there is no base model; without any reference model the
            classes are compared with each other.
        families: Names from `guard.triggers.FAMILIES`.
        budget: How much work to do.
        seed: Seed for the split, the reference model, the starts of the searches and the batches.
        repeats: Number of vettings that must agree (`agreed`), each with the next seed. None for one, and two more
            where its verdict is close to a threshold: what depends on the seed is then `inconclusive`.
        race: Whether to stop early where the result is clear, to inspect only candidates among many classes, and to
            reconstruct only the triggers of classes that stand out. Without it every class of every family is searched
            to the end, which costs ten to fifty times as much, and more among many classes; it serves to measure what
            the race loses.
        probes: Fixed changes that are tried first; by default those of guard's own list.
        cache: Folder in which finished searches are kept, so that an interrupted run continues where it stopped.
        progress: Called with (what is done, steps done, steps in all). A search that ends early jumps to its end.

    Raises:
        ImageError: There are too few images.
        UsageError: The base model is the suspect itself, or has other classes or another input size; or a family is
            unknown.
    """
    _check(classifier, images, base, families, budget)
    if isinstance(classifier, PromptedClassifier) and base is not None and base.digest == classifier.towers.digest:
        base = classifier.towers  # one and the same, through which images then pass once
    tried_probes = tuple(listed_probes() if probes is None else probes)

    def vetted(seed: int) -> Vetting:
        effort = BUDGETS[budget].seeded(seed)
        return _vetted(
            classifier, images, base, families, effort, tried_probes, cache, progress, derive=derive, race=race
        )

    first = vetted(seed)
    count = repeats or (CONFIRMATIONS if is_close(first.verdict) else 1)
    return agreed([first, *(vetted(seed + k) for k in range(1, count))])


def _vetted(
    classifier: Classifier,
    images: Tensor,
    base: Classifier | None,
    families: Sequence[str],
    effort: Effort,
    tried_probes: Sequence[Probe],
    cache: Path | None,
    progress: Callable[[str, int, int], None],
    *,
    derive: bool,
    race: bool,
) -> Vetting:
    """Vet with the seed of the effort."""
    seed = effort.inspection.seed
    started = time.monotonic()
    searched, held_out = halves(images, seed)
    settings = effort.derived_reference if derive else None
    model, reference_model = _reference_model(classifier, base, searched, held_out, settings, progress)
    # A derived reference is identified by how it is made: on a GPU its weights differ in the last bits between runs.
    made = [FRESH_METHOD if _has_contexts(classifier) else REFERENCE_METHOD, asdict(effort.derived_reference)]
    identities = {"base": reference_model.digest, "derived": made, "classes": None}
    identity = identities[reference_model.kind]
    store = SearchCache(cache) if cache else None
    searches = Searches(classifier, model, identity, searched, held_out, store, progress)
    began = time.monotonic()
    probed = searches.probe(tried_probes)
    tried = probe_result(
        probed, classifier.classes.names, reference_model.kind, seed=seed, seconds=time.monotonic() - began
    )
    # Where all classes are inspected anyway there is no need to know candidates.
    many = race and len(tried.classes) > RACED_CLASSES
    unnamed = [each for family in families for each in searches.targets(family, effort.target_search)] if many else []
    candidates = _candidates(tried, unnamed) if many else set()
    runners = Race(searches, reference_model.kind, families, effort.inspection, tried, candidates, full=not race)
    results = runners.run()
    checks, triggers = reconstruct_suspects(
        searches,
        results,
        runners.parameters,
        lambda target: tried_probes[int(probed.probes[target])],
        effort.reconstruction,
        reference_model.kind,
        everything=not race,
    )
    return Vetting(
        _doubting(judge(results, checks), classifier, base),
        results,
        checks,
        triggers,
        effort,
        (len(searched), len(held_out)),
        reference_model,
        str(classifier.device),
        time.monotonic() - started,
        reference_model.passes + sum(item.passes for item in results) + searches.passes,
        tuple(unnamed),
    )


def _doubting(verdict: Verdict, classifier: Classifier, base: Classifier | None) -> Verdict:
    """Return the verdict; `inconclusive` for `no evidence` where the suspect differs from its base as if by noise."""
    if verdict.outcome != "no evidence" or base is None:
        return verdict
    found = difference(classifier, base)
    if found is None or not found.is_noise:
        return verdict
    reason = (
        f"the weights differ from those of the base by {found.size:.0%}, in a way that looks like noise and not like "
        "fine-tuning; noise can hide how a model was changed"
    )
    return replace(verdict, outcome="inconclusive", reasons=(reason, *verdict.reasons))


def _candidates(tried: FamilyResult, found: Sequence[FoundTarget]) -> set[int]:
    """Return the classes that gain most under a probe, or under a trigger of the search that names no class."""
    gains = {entry.target: entry.success for entry in tried.classes}
    for each in found:
        if each.target is not None:
            gains[each.target] = max(gains.get(each.target, 0.0), each.gain)
    return set(sorted(gains, key=lambda target: -gains[target])[:_CANDIDATES])


def _check(
    classifier: Classifier, images: Tensor, base: Classifier | None, families: Sequence[str], budget: str
) -> None:
    if images.dtype is not torch.uint8 or images.shape[1:] != classifier.image_shape:
        raise ImageError(
            f"the images must be uint8 of shape [N, {', '.join(map(str, classifier.image_shape))}], not {images.dtype} "
            f"of shape {list(images.shape)}; Classifier.read makes such images"
        )
    if budget not in BUDGETS:
        raise UsageError(f"there is no budget {budget!r}; there are {', '.join(BUDGETS)}")
    if base is not None and not isinstance(base, Classifier):
        raise UsageError("the base model must be a classifier that was loaded, as guard.load returns it")
    if len(images) < MIN_IMAGES:
        raise ImageError(f"vetting needs at least {MIN_IMAGES} images, there are {len(images)}")
    if not families or not set(families) <= set(FAMILIES):
        raise UsageError(f"the families are some of {', '.join(FAMILIES)}, not {', '.join(families) or 'none'}")
    if base is not None:
        classifier.check_comparable(base)


def _reference_model(
    classifier: Classifier,
    base: Classifier | None,
    searched: Tensor,
    held_out: Tensor,
    settings: DerivedReferenceSettings | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Classifier | None, ReferenceModel]:
    """Return the base model, or else a derived reference if there are settings for one, or else None."""
    if base is not None:
        return base, ReferenceModel("base", base.digest.root, _agreement(classifier, base, held_out), 2 * len(held_out))
    if settings is not None:
        if _has_contexts(classifier):
            model, passes = fresh_prompts(classifier, searched, settings, progress=progress)
        else:
            model, passes = derive_reference(classifier, searched, settings, progress=progress)
        agreement = _agreement(classifier, model, held_out)
        return model, ReferenceModel("derived", None, agreement, passes + 2 * len(held_out))
    return None, ReferenceModel("classes", None, None, 0)


def _has_contexts(classifier: Classifier) -> TypeGuard[PromptedClassifier]:
    """Whether it is a prompt learner whose prompts are contexts; a visual prompt acts as a part of the image tower."""
    return isinstance(classifier, PromptedClassifier) and classifier.learner.kind != "visual"


def _agreement(classifier: Classifier, other: Classifier, images: Tensor) -> float:
    """Return the share of images on which two classifiers give the same answer."""
    first, second = (model.predict(model.embed(images)) for model in (classifier, other))
    return float((first == second).float().mean())
