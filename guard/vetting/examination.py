"""Examine a classifier for backdoors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import ImageError, UsageError
from guard.triggers import FAMILIES
from guard.vetting.agreement import CONFIRMATIONS, agreed, until_clear
from guard.vetting.batches import halves
from guard.vetting.budgets import BUDGETS, Budget, DerivedReferenceSettings, Effort
from guard.vetting.cache import SearchCache
from guard.vetting.difference import difference
from guard.vetting.probes import Probe, listed_probes
from guard.vetting.probes import result as probe_result
from guard.vetting.race import RACED_CLASSES, Race, distinct_classes
from guard.vetting.reconstruction import reconstruct_suspects
from guard.vetting.reference import FRESH_METHOD, derive_reference, fresh_prompts
from guard.vetting.reference import METHOD as REFERENCE_METHOD
from guard.vetting.results import Difference, FamilyResult, FoundTarget, ReferenceModel, Verdict, Vetting
from guard.vetting.searches import Searches
from guard.vetting.verdict import judge

MIN_IMAGES = 64
_UNVOUCHED = (
    "its prompts were compared on its own towers, which nobody vouches for, and a backdoor in the towers would be in "
    "both: give the checkpoint that the towers were taken from as the base"
)
_LEAST_SCALE = 1.0
"""Smallest factor that cosines are multiplied by: models start to train at 10 or more."""
_LEAST_AGREEMENT = 0.5
"""Smallest agreement with a derived reference. Whoever scales single channels up, and undoes it in the next layer,
makes its noise wipe out the others; derived references of good models agree on more than 0.9 of images."""
_ADVICE = {
    "derived": "give the checkpoint that the model was tuned from as the base",
    "towers": "the base is not what its towers were taken from, or the images are not what it was made for",
}
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

    A prompt learner with contexts (CoOp, CoCoOp) is compared with prompts of its form, tuned anew on its own answers
    (`guard.vetting.reference.fresh_prompts`), on the towers of the base. Hand-written prompts may know a class badly,
    of which honest tuning then makes much. On its own towers the comparison shows what lies in the prompts, and is
    blind to what lies in the towers, which moves both: without a base the verdict is `inconclusive` instead of `no
    evidence`.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W] at the classifier's resolution; unlabelled, at least 64.
        base: A trusted model with the same classes and input size, such as the checkpoint that the suspect was tuned
            from, or that the towers of a prompt learner were taken from.
        derive: Whether to derive a reference model where there is no base model; without any reference model the
            classes are compared with each other. Whether to tune prompts anew for a prompt learner; without, it is
            compared with the hand-written ones of the base. A visual prompt is a part of the image tower.
        families: Names from `guard.triggers.FAMILIES`.
        budget: How much work to do.
        seed: Seed for the split, the reference model, the starts of the searches and the batches.
        repeats: Number of vettings, each with the next seed, whose evidence is combined (`agreed`). None for one, and
            up to two more while the verdict is close to a threshold.
        race: Whether to stop early where the result is clear, to inspect only candidates among many classes, and to
            reconstruct only the triggers of classes that stand out. Without it every class of every family is searched
            to the end, which costs ten to fifty times as much, and more among many classes; it serves to measure what
            the race loses.
        probes: Fixed changes that are tried first; by default those of guard's own list.
        cache: Folder in which finished searches are kept, so that an interrupted run continues where it stopped.
        progress: Called with (what is done, steps done, steps in all). A search that ends early jumps to its end. What
            is done for a further seed is told with that seed.

    Raises:
        ImageError: There are too few images.
        UsageError: The base model is the suspect itself, or has other classes or another input size; a family is
            unknown; there is no probe, or two have one name; or `repeats` is less than 1.
    """
    if isinstance(base, PromptedClassifier):
        base = base.towers  # what is asked for is what a learner was made from
    unvouched = derive and base is None and _has_contexts(classifier)
    if isinstance(classifier, PromptedClassifier) and base is not None and base.digest == classifier.towers.digest:
        base = classifier.towers  # one and the same, through which images then pass once
    tried_probes = tuple(listed_probes() if probes is None else probes)
    _check(classifier, images, base, families, budget, tried_probes, repeats)
    examination = _Examination(
        classifier,
        base,
        images,
        tuple(families),
        tried_probes,
        cache,
        derive=derive,
        race=race,
        unvouched=unvouched,
    )
    vettings = (
        examination.vetted(BUDGETS[budget].seeded(seed + k), _named(progress, f"seed {seed + k}, ") if k else progress)
        for k in range(CONFIRMATIONS if repeats is None else repeats)
    )
    found = until_clear(vettings) if repeats is None else agreed(tuple(vettings))
    return replace(found, verdict=examination.doubting(found.verdict, found.reference_model))


@dataclass(frozen=True, eq=False)
class _Examination:
    """What is examined, and with what; each vetting has a seed.

    Attributes:
        classifier: The suspect.
        base: A trusted model; None for none.
        images: uint8, shape [N, 3, H, W].
        families: Names of trigger families.
        probes: Fixed changes that are tried first.
        cache: Folder in which finished searches are kept; None for none.
        derive: Whether to make a reference model where there is no base.
        race: Whether to stop early where the result is clear.
        unvouched: Whether it is a prompt learner, and nobody vouches for its towers.
    """

    classifier: Classifier
    base: Classifier | None
    images: Tensor
    families: tuple[str, ...]
    probes: tuple[Probe, ...]
    cache: Path | None
    derive: bool
    race: bool
    unvouched: bool

    @cached_property
    def difference(self) -> Difference | None:
        """How the weights differ from those of the base, which no seed changes."""
        return None if self.base is None else difference(self.classifier, self.base)

    def vetted(self, effort: Effort, progress: Callable[[str, int, int], None]) -> Vetting:
        """Vet against the base, or against a derived reference, or against none, with the seed of the effort."""
        started, classifier, seed = time.monotonic(), self.classifier, effort.inspection.seed
        searched, held_out = halves(self.images, seed)
        settings = effort.derived_reference if self.derive else None
        model, reference_model = self._reference_model(searched, held_out, settings, progress)
        kind = reference_model.kind
        # A derived reference is known by how it is made: on a GPU its weights differ in the last bits between runs.
        made = [FRESH_METHOD if _has_contexts(classifier) else REFERENCE_METHOD, asdict(effort.derived_reference)]
        identities = {
            "base": reference_model.digest,
            "towers": [reference_model.digest, *made],
            "derived": made,
            "classes": None,
        }
        store = SearchCache(self.cache) if self.cache else None
        searches = Searches(classifier, model, identities[kind], searched, held_out, store, progress)
        began = time.monotonic()
        probed = searches.probe(self.probes)
        tried = probe_result(probed, classifier.classes.names, kind, seed=seed, seconds=time.monotonic() - began)
        # Where all classes are inspected anyway there is no need to know candidates.
        many = self.race and len(distinct_classes(classifier)) > RACED_CLASSES
        unnamed = [each for family in self.families if many for each in searches.targets(family, effort.target_search)]
        candidates = _candidates(tried, unnamed) if many else set()
        race = Race(searches, kind, self.families, effort.inspection, tried, candidates, full=not self.race)
        results = race.run()
        checks, triggers = reconstruct_suspects(
            searches,
            results,
            race.parameters,
            lambda target: self.probes[int(probed.probes[target])],
            effort.reconstruction,
            kind,
            everything=not self.race,
        )
        return Vetting(
            judge(results, checks),
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

    def _reference_model(
        self,
        searched: Tensor,
        held_out: Tensor,
        settings: DerivedReferenceSettings | None,
        progress: Callable[[str, int, int], None],
    ) -> tuple[Classifier | None, ReferenceModel]:
        """Return prompts tuned anew or the base, or else a derived reference if there are settings, or else None."""
        classifier, base = self.classifier, self.base
        if settings is not None and _has_contexts(classifier):
            model, passes = fresh_prompts(classifier, searched, settings, towers=base, progress=progress)
            agreement, passes = _agreement(classifier, model, held_out), passes + 2 * len(held_out)
            if base is None:
                return model, ReferenceModel("derived", None, agreement, passes)
            return model, ReferenceModel("towers", base.digest.root, agreement, passes, self.difference)
        if base is not None:
            agreement = _agreement(classifier, base, held_out)
            return base, ReferenceModel("base", base.digest.root, agreement, 2 * len(held_out), self.difference)
        if settings is not None:
            model, passes = derive_reference(classifier, searched, settings, progress=progress)
            agreement = _agreement(classifier, model, held_out)
            return model, ReferenceModel("derived", None, agreement, passes + 2 * len(held_out))
        return None, ReferenceModel("classes", None, None, 0)

    def doubting(self, verdict: Verdict, reference_model: ReferenceModel) -> Verdict:
        """Return the verdict; `inconclusive` for `no evidence` where something hides what would be evidence."""
        if verdict.outcome != "no evidence":
            return verdict
        scale, agreement = self.classifier.logit_scale, reference_model.agreement
        if self.unvouched:
            reason = _UNVOUCHED
        elif scale < _LEAST_SCALE:
            reason = (
                f"the model multiplies its cosines by {scale:.2g} (logit_scale), which changes no answer and hides "
                f"what would be evidence; a model that was trained has at least {_LEAST_SCALE:g}"
            )
        elif reference_model.kind in {"derived", "towers"} and agreement is not None and agreement < _LEAST_AGREEMENT:
            reason = (
                f"the reference model that was made from the model gives the same answer on {agreement:.0%} of "
                f"images only, so that it says little; {_ADVICE[reference_model.kind]}"
            )
        elif (found := reference_model.difference) is not None and found.is_noise:
            reason = (
                f"the weights differ from those of the base by {found.size:.0%}, in a way that looks like noise and "
                "not like fine-tuning; noise can hide how a model was changed"
            )
        else:
            return verdict
        return replace(verdict, outcome="inconclusive", reasons=(reason, *verdict.reasons))


def _candidates(tried: FamilyResult, found: Sequence[FoundTarget]) -> set[int]:
    """Return the classes that gain most under probes and under triggers of the search that names no class, in turn.

    In turn, so that what gains under many probes, by nature or as a decoy, does not take all places.
    """
    probed = sorted(tried.classes, key=lambda entry: -entry.success)
    searched = sorted(found, key=lambda each: -each.gain)
    named = chain.from_iterable(zip_longest((each.target for each in probed), (each.target for each in searched)))
    return set(list(dict.fromkeys(target for target in named if target is not None))[:_CANDIDATES])


def _check(
    classifier: Classifier,
    images: Tensor,
    base: Classifier | None,
    families: Sequence[str],
    budget: str,
    probes: Sequence[Probe],
    repeats: int | None,
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
    if not probes:
        raise UsageError("there is no probe to try; give none to try those of guard's list, or at least one")
    if len({probe.name for probe in probes}) < len(probes):
        raise UsageError("two probes have the same name, by which results are kept; give each a name of its own")
    if repeats is not None and repeats < 1:
        raise UsageError(f"a model is vetted at least once, not {repeats} times")
    if base is not None:
        classifier.check_comparable(base)


def _named(progress: Callable[[str, int, int], None], name: str) -> Callable[[str, int, int], None]:
    """Return what tells the progress of work under a name."""
    return lambda what, done, total: progress(name + what, done, total)


def _has_contexts(classifier: Classifier) -> TypeGuard[PromptedClassifier]:
    """Whether it is a prompt learner whose prompts are contexts; a visual prompt acts as a part of the image tower."""
    return isinstance(classifier, PromptedClassifier) and classifier.learner.kind != "visual"


def _agreement(classifier: Classifier, other: Classifier, images: Tensor) -> float:
    """Return the share of images on which two classifiers give the same answer."""
    first, second = (model.predict(model.embed(images)) for model in (classifier, other))
    return float((first == second).float().mean())
