"""Examine a classifier for backdoors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.classifier import Classifier
from guard.classifiers.digest import canonical, sha256
from guard.errors import ImageError, UsageError
from guard.triggers import FAMILIES, InvertibleTrigger, Raw
from guard.vetting.batches import halves
from guard.vetting.cache import SearchCache
from guard.vetting.inspection import RADII, Inspected, InspectionSettings, Inspector
from guard.vetting.inversion import Reconstruction, SearchSettings, reconstruct
from guard.vetting.lead import Lead
from guard.vetting.nulls import outliers, prior
from guard.vetting.reference import DerivedReferenceSettings, derive_reference
from guard.vetting.results import Check, ClassStatistic, FamilyResult, ReferenceKind, ReferenceModel
from guard.vetting.verdict import DOUBT, NOTICED, Verdict, class_results, is_accused, is_valid, judge, suspects

METHOD = "inspection 1"
MIN_IMAGES = 64
CLASS_BATCH = 16
"""Classes searched side by side; bounds memory, and is the unit of work that an interrupted run does not repeat."""
RACED_CLASSES = 32
"""Number of classes above which those far behind are dropped half-way."""
_REFERENCE = 24
"""Classes, drawn in advance, that are never dropped: the null of those that are left."""
_KEPT = 0.25
"""Share of the classes that go on besides them."""
_TIE = 0.1
"""How far behind the last that goes on a class still counts as level with it, in units of the statistic: a search
repeats within this."""
_CLEAR = 1e-6
"""Corrected p-value at which half the steps are enough. So small that looking twice costs no false alarm worth a
correction."""
_HOPELESS = 0.2
"""Smallest p-value of any family, corrected for its classes only, above which the other half of the steps is saved."""
_MOST_SUSPECTS = 4
_TRIES = 3
"""Families in which a suspect's trigger is reconstructed, those in which it stands out most; more only until one
passes its check. Each try costs as much as the inspection of several classes."""
_AS_NEAR = 2.0
"""A class's second trigger is kept for screening if it is at most so many times as strong as its first, each relative
to the radius of its family. The family that needs the least is nearest to the attacker's own; one that only gets there
by force stamps the bank with something else, and blurs the match."""

Budget = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class Effort:
    """How hard to look for what stands out, and then for the trigger itself.

    Attributes:
        inspection: Of all classes and families.
        reconstruction: Of the classes that stand out.
        derived_reference: How a reference model is made where there is no base.
    """

    inspection: InspectionSettings
    reconstruction: SearchSettings
    derived_reference: DerivedReferenceSettings = field(default_factory=DerivedReferenceSettings)

    def seeded(self, seed: int) -> "Effort":
        """The same effort with another seed."""
        return Effort(
            replace(self.inspection, seed=seed),
            replace(self.reconstruction, seed=seed),
            replace(self.derived_reference, seed=seed),
        )


BUDGETS: dict[Budget, Effort] = {
    "quick": Effort(InspectionSettings(steps=16), SearchSettings(steps=100, batch=32, stall=30)),
    "standard": Effort(InspectionSettings(steps=32), SearchSettings(steps=160, batch=48, stall=50)),
    "thorough": Effort(InspectionSettings(steps=64, batch=64), SearchSettings(steps=400, batch=96, stall=100)),
}


@dataclass(frozen=True)
class ReconstructedTrigger:
    """A reconstructed trigger that stands out, strengthened for screening.

    Attributes:
        id: Names it in profile, metrics and replies: family and class index.
        target: Class index that it leads to.
        trigger: The transformation.
        norm: Its norm, in the family's unit; larger than the minimal norm of the check.
        success: Success on held-out images, in [0, 1].
        p_value: Corrected for classes, combined over families.
        feature: The target feature: mean embedding of the held-out images under the trigger, of length 1; shape [D].
    """

    id: str
    target: int
    trigger: InvertibleTrigger
    norm: float
    success: float
    p_value: float
    feature: Tensor


@dataclass(frozen=True)
class Vetting:
    """The result of examining one classifier.

    Attributes:
        verdict: What it comes to.
        evidence: One entry per family.
        checks: The smallest triggers of the classes that stand out, tried on held-out images.
        triggers: Those that passed, strongest evidence first.
        effort: How hard was searched.
        images: Number of images used to search, and kept out for the check.
        reference_model: What the classifier was compared with.
        device: Where it ran.
        seconds: Wall-clock time.
        passes: Images pushed through image towers, the reference model's included.
    """

    verdict: Verdict
    results: tuple[FamilyResult, ...]
    checks: tuple[Check, ...]
    triggers: tuple[ReconstructedTrigger, ...]
    effort: Effort
    images: tuple[int, int]
    reference_model: ReferenceModel
    device: str
    seconds: float
    passes: int


def vet(
    classifier: Classifier,
    images: Tensor,
    *,
    base: Classifier | None = None,
    derive: bool = True,
    families: Sequence[str] = tuple(FAMILIES),
    budget: Budget = "standard",
    seed: int = 0,
    race: bool = True,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Vetting:
    """Look for a class that triggers of limited strength reach too easily, reconstruct its trigger, and judge.

    Half of the images are searched on, half are kept out for the check. Everything is measured against a reference
    model: the base if there is one, otherwise one made from the classifier itself.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W] at the classifier's resolution; unlabelled, at least 64.
        base: A trusted model with the same classes and input size, such as the checkpoint it was tuned from.
        derive: Without a base, whether to make a reference model; if not, the classes are compared with each other.
        families: Names from `guard.triggers.FAMILIES`.
        budget: How hard to search.
        seed: Of the split, the reference model, the starts and the batches.
        race: Whether to stop early where the result is clear, drop classes that are far behind, and reconstruct the
            triggers of only those that stand out. Without it every class of every family is searched to the end, which
            costs ten to fifty times as much and is there to measure what the race loses.
        cache: Folder in which finished searches are kept, so that an interrupted run goes on where it stopped.
        progress: Told (what, classes done, classes in all).

    Raises:
        ImageError: There are too few images.
        UsageError: The base is the suspect itself, or has other classes or another input size; or a family is unknown.
    """
    started = time.monotonic()
    if len(images) < MIN_IMAGES:
        raise ImageError(f"vetting needs at least {MIN_IMAGES} images, there are {len(images)}")
    if not families or not set(families) <= set(FAMILIES):
        raise UsageError(f"families are some of {', '.join(FAMILIES)}, not {', '.join(families) or 'none'}")
    if base is not None:
        _check_base(classifier, base)
    effort = BUDGETS[budget].seeded(seed)
    searched, held_out = halves(images, seed)
    model, reference_model = _reference_model(classifier, base, searched, held_out, effort if derive else None)
    # A derived reference is known by how it is made: on a GPU its weights differ in the last bits from run to run.
    made_by = {"base": reference_model.digest, "derived": asdict(effort.derived_reference), "classes": None}[
        reference_model.kind
    ]
    store = SearchCache(cache) if cache else None
    searches = _Searches(classifier, model, made_by, searched, held_out, store, progress)
    inspection = _Inspection(searches, reference_model, families, effort.inspection, race=race)
    evidence = inspection.run()
    checks, triggers = _reconstruct(
        searches, inspection, evidence, effort.reconstruction, reference_model.kind, exhaustive=not race
    )
    return Vetting(
        judge(evidence, checks),
        evidence,
        checks,
        triggers,
        effort,
        (len(searched), len(held_out)),
        reference_model,
        str(classifier.device),
        time.monotonic() - started,
        reference_model.passes + searches.passes,
    )


def _check_base(classifier: Classifier, base: Classifier) -> None:
    if base.digest.root == classifier.digest.root:
        raise UsageError("the base is the model itself; a model compared with itself shows nothing")
    if base.classes.names != classifier.classes.names:
        raise UsageError("the base has other classes than the model; give both the same list with --classes")
    if base.image_shape != classifier.image_shape:
        raise UsageError(f"the base takes images of {base.image_shape[1:]}, the model of {classifier.image_shape[1:]}")


def _reference_model(
    classifier: Classifier, base: Classifier | None, searched: Tensor, held_out: Tensor, effort: Effort | None
) -> tuple[Classifier | None, ReferenceModel]:
    if base is None and effort is None:
        return None, ReferenceModel("classes", None, None, 0)
    passes = 0
    if base is None and effort is not None:
        model, passes = derive_reference(classifier, searched, effort.derived_reference)
    else:
        model = base  # type: ignore[assignment]  # one of the two is there
    agreement = (model.predict(model.embed(held_out)) == classifier.predict(classifier.embed(held_out))).float().mean()
    digest = base.digest.root if base else None
    return model, ReferenceModel("base" if base else "derived", digest, float(agreement), passes + 2 * len(held_out))


class _Searches:
    """Runs searches for batches of classes, and remembers the finished ones."""

    def __init__(
        self,
        classifier: Classifier,
        reference_model: Classifier | None,
        made_by: object,
        searched: Tensor,
        held_out: Tensor,
        cache: SearchCache | None,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.classifier, self.reference_model = classifier, reference_model
        self.searched, self.held_out = searched, held_out
        self.progress, self._cache = progress, cache
        self.lead = Lead(classifier, searched, reference_model)
        digests = [
            classifier.digest.root,
            made_by,
            *(sha256(part.contiguous().numpy().data) for part in (searched, held_out)),
        ]
        self._subject = canonical(digests) if cache else b""
        self.passes = 0

    def key(self, *what: object) -> str:
        """Names a search in the cache."""
        return sha256(self._subject + canonical([METHOD, *what]))[:40]

    def load(self, name: str) -> list[tuple[dict[str, Any], dict[str, Tensor]]] | None:
        """A finished search; None if it is not there."""
        return self._cache.load(name) if self._cache else None

    def save(self, name: str, entries: Sequence[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
        """Remember a finished search."""
        if self._cache:
            self._cache.save(name, entries)

    def reconstruct(
        self, family: str, start: dict[int, Raw], settings: SearchSettings, what: str
    ) -> list[Reconstruction]:
        """The smallest triggers for some classes, from where their inspection ended."""
        results: list[Reconstruction] = []
        targets = list(start)
        for part in (targets[k : k + CLASS_BATCH] for k in range(0, len(targets), CLASS_BATCH)):
            self.progress(what, len(results), len(targets))
            name = self.key("reconstruction", family, asdict(settings), part, _fingerprint([start[k] for k in part]))
            known = self.load(name)
            if known is not None:
                results += [
                    Reconstruction(trigger=FAMILIES[family].from_tensors(held), **values) for values, held in known
                ]
                continue
            stacked = {key: torch.stack([start[k][key] for k in part]) for key in start[part[0]]}
            done = reconstruct(
                self.classifier,
                FAMILIES[family],
                self.searched,
                self.held_out,
                torch.tensor(part),
                settings,
                reference_model=self.reference_model,
                start=stacked,
            )
            self.save(name, [(_numbers(item, "trigger"), item.trigger.tensors()) for item in done])
            results += done
        self.progress(what, len(targets), len(targets))
        self.passes += sum(item.passes for item in results)
        return results


def _numbers(item: Inspected | Reconstruction, tensors: str) -> dict[str, Any]:
    return {key: value for key, value in vars(item).items() if key != tensors}


def _fingerprint(starts: Sequence[Raw]) -> str:
    parts = [sha256(tensor.contiguous().numpy().data) for raw in starts for tensor in raw.values()]
    return sha256(canonical(parts))


class _Inspection:
    """All families and classes, first for half of the steps, then, where that is not enough, to the end."""

    def __init__(
        self,
        searches: _Searches,
        reference_model: ReferenceModel,
        families: Sequence[str],
        settings: InspectionSettings,
        *,
        race: bool,
    ) -> None:
        self._searches, self._reference_model = searches, reference_model
        self._families, self._settings, self._race = families, settings, race
        self._names = searches.classifier.classes.names
        self._raced = race and len(self._names) > RACED_CLASSES
        drawn = torch.randperm(len(self._names), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        self._reference = set(drawn[:_REFERENCE] if self._raced else drawn)
        self._inspectors: dict[tuple[str, int], Inspector] = {}
        self._found: dict[str, dict[int, dict[int, Inspected]]] = {family: {} for family in families}
        """By family, steps and class."""
        self._seconds = dict.fromkeys(families, 0.0)

    def run(self) -> tuple[FamilyResult, ...]:
        """Search, and compare the classes."""
        active = {family: list(range(len(self._names))) for family in self._families}
        half, whole = max(1, self._settings.steps // 2), self._settings.steps
        evidence: tuple[FamilyResult, ...] = ()
        for steps in (half, whole) if self._race else (whole,):
            for family in self._families:
                self._run(family, active[family], steps)
            evidence = tuple(self._evidence(family) for family in self._families)
            if _is_settled(evidence):
                break
            if self._raced:
                active = {item.family: self._survivors(item) for item in evidence}
        self._searches.passes += sum(item.passes for item in evidence)
        return evidence

    def raw(self, family: str, target: int) -> Raw:
        """Where the search for a class ended."""
        return self._latest(family)[target][1].raw

    def _latest(self, family: str) -> dict[int, tuple[int, Inspected]]:
        """The last that is known of each class, with the steps that it took."""
        return {
            target: (steps, item)
            for steps, found in sorted(self._found[family].items())
            for target, item in found.items()
        }

    def _run(self, family: str, targets: Sequence[int], steps: int) -> None:
        began = time.monotonic()
        found = self._found[family].setdefault(steps, {})
        self._searches.progress(family, 0, len(targets))
        for start in range(0, len(self._names), CLASS_BATCH):
            part = [target for target in targets if start <= target < start + CLASS_BATCH]
            if not part:
                continue
            name = self._searches.key("inspection", family, asdict(self._settings), RADII[family], steps, start, part)
            known = self._searches.load(name)
            if known is None:
                done = self._inspector(family, start).run(steps, part)
                self._searches.save(name, [(_numbers(item, "raw"), item.raw) for item in done])
            else:
                done = [Inspected(raw=held, **values) for values, held in known]
            found.update((item.target, item) for item in done)
            self._searches.progress(family, len(found), len(targets))
        self._seconds[family] += time.monotonic() - began

    def _inspector(self, family: str, start: int) -> Inspector:
        """Kept in memory between the two halves; after an interruption it starts again."""
        if (family, start) not in self._inspectors:
            targets = torch.arange(start, min(start + CLASS_BATCH, len(self._names)))
            self._inspectors[family, start] = Inspector(self._searches.lead, FAMILIES[family], targets, self._settings)
        return self._inspectors[family, start]

    def _survivors(self, item: FamilyResult) -> list[int]:
        """Those that go on: the reference, the leading quarter, and whoever is level with its last."""
        ranked = sorted((entry.statistic for entry in item.classes), reverse=True)
        last = ranked[max(1, int(_KEPT * len(ranked))) - 1] - _TIE
        return [entry.target for entry in item.classes if entry.statistic >= last or entry.target in self._reference]

    def _evidence(self, family: str) -> FamilyResult:
        """Each class against the reference after as many steps as it has had itself."""
        latest = self._latest(family)
        scores, p_values = np.full((2, len(self._names)), np.nan)
        for steps, found in self._found[family].items():
            values = [found[target].lead if target in found else None for target in range(len(self._names))]
            reference = [target in self._reference for target in range(len(self._names))]
            judged = np.array([latest[target][0] == steps for target in range(len(self._names))])
            fresh = outliers(values, prior(self._reference_model.kind, family, steps), reference)
            scores, p_values = (np.where(judged, new, old) for new, old in zip(fresh, (scores, p_values), strict=True))
        classes = tuple(
            ClassStatistic(
                target,
                self._names[target],
                item.lead,
                item.success,
                steps,
                None if np.isnan(scores[target]) else float(scores[target]),
                None if np.isnan(p_values[target]) else float(p_values[target]),
            )
            for target, (steps, item) in sorted(latest.items())
        )
        return self._combined(family, classes)

    def _combined(self, family: str, classes: tuple[ClassStatistic, ...]) -> FamilyResult:
        tested = [entry for entry in classes if entry.p_value is not None]
        leading = min(tested, key=lambda entry: entry.p_value or 0.0, default=None)
        beyond = {
            "base": ", beyond what the trigger does on the base",
            "derived": ", beyond what the trigger does on the derived reference",
            "classes": "",
        }
        models = prior(self._reference_model.kind, family, max(entry.steps for entry in classes)).models
        moderated = f", their spread moderated by {models} clean models" if models else ""
        return FamilyResult(
            METHOD,
            family,
            RADII[family],
            FAMILIES[family].norm_unit,
            f"lead of the class under its trigger{beyond[self._reference_model.kind]}",
            f"Student-t prediction from the other classes{moderated}, one-sided, Bonferroni over {len(tested)} classes",
            self._reference_model.kind,
            classes,
            leading.target if leading else None,
            1.0 if leading is None else min(1.0, (leading.p_value or 0.0) * len(tested)),
            self._settings.seed,
            sum(item.passes for _, item in self._latest(family).values()),
            self._seconds[family],
        )


def _is_settled(evidence: Sequence[FamilyResult]) -> bool:
    """Whether the rest of the steps would hardly change the verdict."""
    ranked = class_results(evidence)
    hopeful = min(item.p_value for item in evidence)
    return (bool(ranked) and ranked[0].p_value <= _CLEAR) or hopeful > _HOPELESS


def _reconstruct(
    searches: _Searches,
    inspection: _Inspection,
    evidence: Sequence[FamilyResult],
    settings: SearchSettings,
    reference_model: ReferenceKind,
    *,
    exhaustive: bool,
) -> tuple[tuple[Check, ...], tuple[ReconstructedTrigger, ...]]:
    """The smallest triggers of the classes that stand out, and for those that work one for screening."""
    everything: dict[tuple[str, int], Reconstruction] = {}
    if exhaustive:
        for item in evidence:
            start = {entry.target: inspection.raw(item.family, entry.target) for entry in item.classes}
            results = searches.reconstruct(item.family, start, settings, f"{item.family}, reconstruction")
            everything.update(((item.family, result.target), result) for result in results)
    checks: list[Check] = []
    triggers: list[ReconstructedTrigger] = []
    for standing in (suspects(evidence, DOUBT) or suspects(evidence, NOTICED)[:1])[:_MOST_SUSPECTS]:
        target = standing.target
        found: list[tuple[float, str, Reconstruction]] = []
        for k, (family, own) in enumerate(standing.families):
            if k >= _TRIES and (found or own > DOUBT):
                break
            start = {target: inspection.raw(family, target)}
            small = (
                everything.get((family, target))
                or searches.reconstruct(family, start, settings, f"{family}, reconstruction")[0]
            )
            check = Check(
                family,
                target,
                searches.classifier.classes.names[target],
                small.norm,
                RADII[family],
                FAMILIES[family].norm_unit,
                small.reached,
                small.success,
                small.reference_success,
                reference_model,
            )
            checks.append(check)
            if is_valid(check):
                found.append((check.strength, family, small))
        found.sort(key=lambda item: item[0])
        for strength, family, small in found[:2]:
            if strength <= _AS_NEAR * found[0][0]:
                start = {target: inspection.raw(family, target)}
                triggers.append(_strengthen(searches, family, small, start, standing.p_value, settings))
    # Triggers that are merely doubtful would cost a sure verdict's screening some of its sharpness.
    sure = {item.target for item in class_results(evidence) if is_accused(item, checks)}
    kept = [trigger for trigger in triggers if (trigger.target in sure if sure else trigger.p_value <= DOUBT)]
    return tuple(checks), tuple(sorted(kept, key=lambda trigger: trigger.p_value))


def _strengthen(
    searches: _Searches,
    family: str,
    weak: Reconstruction,
    start: dict[int, Raw],
    p_value: float,
    settings: SearchSettings,
) -> ReconstructedTrigger:
    """Search once more for a trigger that wins as clearly as a genuine image of the class does.

    The smallest trigger is the right thing to look at and the wrong tool for screening: it barely crosses the boundary,
    where the attacker's own trigger goes to the middle of the class.
    """
    strong = replace(settings, success=0.99, margin=1.0, batch=max(64, settings.batch))
    result = searches.reconstruct(family, start, strong, f"{family}, strengthened")[0]
    best = result if result.reached and result.success >= weak.success else weak
    feature = normalize(searches.classifier.embed(best.trigger.stamp(searches.held_out)).mean(0), dim=0)
    searches.passes += len(searches.held_out)
    return ReconstructedTrigger(
        _id(family, best.target), best.target, best.trigger, best.norm, best.success, p_value, feature
    )


def _id(family: str, target: int) -> str:
    return f"{family.replace(' ', '-')}-{target}"
