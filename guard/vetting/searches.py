"""Run searches on one suspect, batch by batch of classes, and remember the finished ones."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.classifier import Classifier
from guard.classifiers.digest import canonical, sha256
from guard.triggers import FAMILIES, InvertibleTrigger, Raw
from guard.vetting.budgets import InspectionSettings, SearchSettings, TargetSearchSettings
from guard.vetting.cache import SearchCache
from guard.vetting.inspection import METHOD, RADII, Inspected, Inspector
from guard.vetting.inversion import Reconstruction, effect, reconstruct
from guard.vetting.lead import Lead
from guard.vetting.probes import EXAMINED, Probe, Probed, probe_classes
from guard.vetting.probes import METHOD as PROBE_METHOD
from guard.vetting.results import FoundTarget
from guard.vetting.search import METHOD as TARGET_METHOD
from guard.vetting.search import search_targets

_HALF = 0.5
"""Strength of a trigger, in radii, under which classes are told apart by how near their images come to another class.
Under the whole strength the images of most classes come near to it."""
_COMPARED = 96
"""Number of images with which that is found out."""
_FEWEST_OF_A_CLASS = 3
"""Fewest of these that say where the images of a class are."""
_FEWEST = 16
"""Fewest images of some classes on which a trigger is searched for, and on which it is checked."""
CLASS_BATCH = 16
"""Number of classes that are searched side by side. It bounds memory, and a batch is the unit of work that an
interrupted run does not repeat."""


class Searches:
    """All searches on one suspect, on one split of the images, against one reference model.

    Args:
        classifier: The suspect.
        reference_model: The model that it is compared with; None for none.
        reference_identity: What tells this reference model from others, as JSON-like values: it is part of the names in
            the cache.
        searched: uint8, shape [N, 3, H, W]: images to search on.
        held_out: uint8, shape [M, 3, H, W]: images for the checks.
        cache: Store of finished searches; None to remember nothing.
        progress: Called with (what is searched, steps of all its classes done, steps in all).

    Attributes:
        passes: Number of images pushed through image towers by reconstructions, checks and searches that name no class.
    """

    def __init__(
        self,
        classifier: Classifier,
        reference_model: Classifier | None,
        reference_identity: object,
        searched: Tensor,
        held_out: Tensor,
        cache: SearchCache | None,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.classifier = classifier
        self.passes = 0
        self._reference_model = reference_model
        self._searched, self._held_out = searched, held_out
        self._lead = Lead(classifier, searched, reference_model)
        self._progress, self._cache = progress, cache
        identity = [
            classifier.digest.root,
            reference_identity,
            *(sha256(part.contiguous().numpy().data) for part in (searched, held_out)),
        ]
        self._subject = canonical(identity) if cache else b""
        self._batches: dict[str, list[tuple[int, ...]]] = {}
        self._inspectors: dict[tuple[str, tuple[int, ...]], Inspector] = {}
        self._of_some: dict[tuple[int, ...], tuple[Lead, Tensor]] = {(): (self._lead, held_out)}
        """What is searched on and what is held out of the images of some classes; with no classes, of all."""

    def probe(self, probes: Sequence[Probe]) -> Probed:
        """Return what a list of fixed changes of the images to search on does for each class."""
        name = self._name(PROBE_METHOD, [probe.name for probe in probes])
        known = self._cache.load(name) if self._cache else None
        if known is not None:
            ((numbers, tensors),) = known
            return Probed(tensors["gains"], tensors["probes"], **numbers)
        found = probe_classes(
            self.classifier, self._searched, probes, reference_model=self._reference_model, progress=self._progress
        )
        if self._cache:
            self._cache.save(name, [({"passes": found.passes}, {"gains": found.gains, "probes": found.probes})])
        return found

    def targets(self, family: str, settings: TargetSearchSettings) -> list[FoundTarget]:
        """Return what a search that names no class ends at, start by start."""
        name = self._name(TARGET_METHOD, family, asdict(settings), RADII[family])
        known = self._cache.load(name) if self._cache else None
        if known is None:
            found = search_targets(
                self.classifier,
                self._searched,
                family,
                settings,
                reference_model=self._reference_model,
                progress=lambda done: self._progress(f"{family}, any class", done, settings.starts),
            )
            if self._cache:
                self._cache.save(name, [(_numbers(item, "feature"), {"feature": item.feature}) for item in found])
        else:
            found = [FoundTarget(feature=tensors["feature"], **numbers) for numbers, tensors in known]
        self.passes += sum(item.passes for item in found)
        return found

    def probe_effects(self, probe: Probe, target: int) -> tuple[float, float | None]:
        """Return which shares of the held-out images of other classes a probe moves to a class.

        Returns:
            The share on the suspect, and the share on the reference model; None without one.
        """
        effects = [
            effect(model, probe.stamp, target, self._held_out)
            for model in (self.classifier, self._reference_model)
            if model is not None
        ]
        self.passes += sum(item.passes for item in effects)
        return effects[0].success, effects[1].success if len(effects) > 1 else None

    def mean_change(self, probe: Probe) -> Tensor:
        """Return what a probe adds to the images to search on, on the average: shape [3, H, W]."""
        pixels = self._searched[:EXAMINED].float() / 255
        return (probe.change(pixels) - pixels).mean(0)

    def inspect(
        self, family: str, settings: InspectionSettings, steps: int, targets: Sequence[int]
    ) -> dict[int, Inspected]:
        """Search for the best trigger of limited strength for each of some classes, until `steps` steps are done.

        The classes of the first call for a family are divided into batches, each with a search that stays in memory, so
        that more steps, for all or some of these classes, continue from the last.
        """
        found: dict[int, Inspected] = {}
        total = steps * len(targets)
        self._progress(family, 0, total)
        batched = self._batches.setdefault(
            family, [tuple(targets[k : k + CLASS_BATCH]) for k in range(0, len(targets), CLASS_BATCH)]
        )
        for together in batched:
            part = [target for target in together if target in targets]
            if not part:
                continue
            name = self._name("inspection", family, asdict(settings), RADII[family], steps, together, part)
            known = self._cache.load(name) if self._cache else None
            if known is None:
                progress = self._steps(family, steps * len(found), len(part), total)
                done = self._inspector(family, settings, together).run(steps, part, progress=progress)
                if self._cache:
                    self._cache.save(name, [(_numbers(item, "raw"), item.raw) for item in done])
            else:
                done = [Inspected(raw=tensors, **numbers) for numbers, tensors in known]
            found.update((item.target, item) for item in done)
            self._progress(family, steps * len(found), total)
            if steps >= settings.steps:
                self._inspectors.pop((family, together), None)  # it holds parameters as large as images
        return found

    def _inspector(self, family: str, settings: InspectionSettings, together: tuple[int, ...]) -> Inspector:
        if (family, together) not in self._inspectors:
            targets = torch.tensor(together)
            self._inspectors[family, together] = Inspector(self._lead, FAMILIES[family], targets, settings)
        return self._inspectors[family, together]

    def nearest_sources(self, family: str, target: int, raw: Raw) -> tuple[float, tuple[int, ...]]:
        """Return the third of the classes whose images a trigger brings nearest to another class, and how near.

        An attacker's trigger may work on the images of some classes only (TaCT, Tang et al., USENIX Security 2021).
        Those of other classes then stay where they were, and a trigger that moves all of them must be large.

        Args:
            family: Family of the trigger.
            target: Index of the class that it leads to.
            raw: Its unconstrained parameters.

        Returns:
            The mean distance of the images of these classes from the target (`Lead.distance`), with a trigger of half
            the radius, and the indices of the classes, in order; infinity and none where too few images are in them.
        """
        weak = FAMILIES[family].constrain({name: tensor[None] for name, tensor in raw.items()})
        weak = weak.limited(_HALF * RADII[family])
        index, targets = torch.arange(min(len(self._searched), _COMPARED)), torch.tensor([target])
        targets = targets.to(self.classifier.device)
        with torch.no_grad():
            parts = [
                self._lead.distance(weak.apply(self._lead.pixels(part)), part, targets)[0].float().cpu()
                for part in index.split(32)
            ]
        self.passes += len(index) * self._lead.towers
        distances, predicted = torch.cat(parts), self._lead.predicted[index]
        means = {
            k: float(distances[predicted == k].mean())
            for k, count in zip(*(each.tolist() for each in predicted.unique(return_counts=True)), strict=True)
            if k != target and count >= _FEWEST_OF_A_CLASS
        }
        nearest = sorted(means, key=lambda k: means[k])[: max(1, len(means) // 3)]
        sources = tuple(sorted(nearest))
        lead, held_out = self._images_of(sources)
        if not sources or min(len(lead.images), len(held_out)) < _FEWEST:
            return inf, ()
        return sum(means[k] for k in sources) / len(sources), sources

    def _images_of(self, sources: tuple[int, ...]) -> tuple[Lead, Tensor]:
        """Return what is searched on and what is held out of the images that the suspect sees in some classes."""
        if sources not in self._of_some:
            wanted = torch.tensor(sources)
            searched = self._searched[torch.isin(self._lead.predicted, wanted)]
            self._of_some[sources] = (
                Lead(self.classifier, searched, self._reference_model),
                self._held_out[torch.isin(self._held_out_answers, wanted)],
            )
        return self._of_some[sources]

    @cached_property
    def _held_out_answers(self) -> Tensor:
        self.passes += len(self._held_out)
        return self.classifier.predict(self.classifier.embed(self._held_out)).cpu()

    def reconstruct(
        self,
        family: str,
        start: dict[int, Raw],
        settings: SearchSettings,
        what: str,
        sources: tuple[int, ...] = (),
    ) -> list[Reconstruction]:
        """Search for the smallest trigger for each of some classes.

        Args:
            family: Family of the triggers.
            start: For each class the unconstrained parameters to start from: those with which its inspection ended.
            settings: How much work to do.
            what: Description of the search, for progress.
            sources: Classes on whose images the triggers are searched for and checked; none for all.
        """
        results: list[Reconstruction] = []
        targets = list(start)
        for part in (targets[k : k + CLASS_BATCH] for k in range(0, len(targets), CLASS_BATCH)):
            progress = self._steps(what, settings.steps * len(results), len(part), settings.steps * len(targets))
            progress(0)
            fingerprint = _fingerprint([start[target] for target in part])
            name = self._name("reconstruction", family, asdict(settings), part, fingerprint, sources)
            known = self._cache.load(name) if self._cache else None
            if known is None:
                done = self._reconstruct(family, part, start, settings, progress, sources)
                if self._cache:
                    self._cache.save(name, [(_numbers(item, "trigger"), item.trigger.tensors()) for item in done])
            else:
                done = [
                    Reconstruction(trigger=FAMILIES[family].from_tensors(tensors), **numbers)
                    for numbers, tensors in known
                ]
            results += done
        self._progress(what, settings.steps * len(targets), settings.steps * len(targets))
        self.passes += sum(item.passes for item in results)
        return results

    def _reconstruct(
        self,
        family: str,
        part: Sequence[int],
        start: dict[int, Raw],
        settings: SearchSettings,
        progress: Callable[[int], None],
        sources: tuple[int, ...],
    ) -> list[Reconstruction]:
        lead, held_out = self._images_of(sources)
        return reconstruct(
            lead,
            FAMILIES[family],
            held_out,
            torch.tensor(part),
            settings,
            start={key: torch.stack([start[target][key] for target in part]) for key in start[part[0]]},
            progress=progress,
        )

    def _steps(self, what: str, before: int, classes: int, total: int) -> Callable[[int], None]:
        """Return what tells the steps of some classes side by side, after those of earlier ones."""
        return lambda done: self._progress(what, before + classes * done, total)

    def target_feature(self, trigger: InvertibleTrigger, sources: tuple[int, ...]) -> Tensor:
        """Return the mean embedding of the held-out images of some classes under a trigger, of length 1; shape [D]."""
        _, images = self._images_of(sources)
        self.passes += len(images)
        return normalize(self.classifier.embed(trigger.stamp(images)).mean(0), dim=0)

    def _name(self, *what: object) -> str:
        """Return the name of a search in the cache: a digest of everything that its result depends on."""
        return sha256(self._subject + canonical([METHOD, *what]))[:40]


def _numbers(item: Inspected | Reconstruction | FoundTarget, tensors: str) -> dict[str, Any]:
    """Return all fields of a result but the one with its tensors."""
    return {key: value for key, value in vars(item).items() if key != tensors}


def _fingerprint(starts: Sequence[Raw]) -> str:
    parts = [sha256(tensor.contiguous().numpy().data) for raw in starts for tensor in raw.values()]
    return sha256(canonical(parts))
