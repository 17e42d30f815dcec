from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import guard.vetting.verdict
from guard.errors import ImageError, UsageError
from guard.triggers import FAMILIES
from guard.vetting import (
    BUDGETS,
    DerivedReferenceSettings,
    Effort,
    InspectionSettings,
    Inspector,
    Prior,
    ReferenceModel,
    SearchSettings,
    Vetting,
    effect,
    reconstruct,
    vet,
)
from guard.vetting.budgets import TargetSearchSettings
from guard.vetting.inspection import RADII, divided
from guard.vetting.nulls import NO_PRIOR
from guard.vetting.probes import SCREENED, Probe, listed_probes
from guard.vetting.race import null_classes
from guard.vetting.results import PROBES
from guard.vetting.verdict import class_results
from tests.conftest import random_images
from tests.toy import checkerboard, toy

IMAGES, OTHERS = random_images(128), random_images(60, seed=9)
TARGET = 3
FAST = Effort(
    InspectionSettings(steps=8, batch=16, average=4),
    SearchSettings(steps=30, batch=16, stall=15),
    DerivedReferenceSettings(steps=3, batch=16),
    TargetSearchSettings(steps=8, batch=16),
)
PLANTED = Probe("planted", lambda images: (images + 0.1 * checkerboard()).clamp(0, 1))
OTHER = [Probe("darker", lambda images: 0.8 * images), Probe("mirrored", lambda images: images.flip(-1))]
BASE, SUSPECT, TWIN = toy(), toy(target=TARGET, jitter=0.02), toy(jitter=0.02)


@pytest.fixture(autouse=True)
def _quick_and_without_shipped_priors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "quick", FAST)
    for module in ("race", "probes"):
        monkeypatch.setattr(f"guard.vetting.{module}.prior", lambda *_: NO_PRIOR)
    monkeypatch.setattr("guard.vetting.probes.largest", lambda *_: None)


@pytest.fixture
def _to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.vetting.race._is_clear", lambda _: False)
    monkeypatch.setattr("guard.vetting.race._HOPELESS", 1.0)


class Calls:
    """Counts searches, and can interrupt one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.interrupt_at = 0
        run = Inspector.run
        monkeypatch.setattr(Inspector, "run", self._counted("inspection", run))
        monkeypatch.setattr("guard.vetting.searches.reconstruct", self._counted("reconstruction", reconstruct))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.names.append(name)
            if len(self.names) == self.interrupt_at:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_a_planted_backdoor_is_found_with_its_target_and_trigger() -> None:
    vetting = vet(SUSPECT, IMAGES, base=BASE, budget="quick")
    assert (vetting.verdict.outcome, vetting.verdict.target) == ("backdoored", TARGET)
    assert vetting.verdict.p_value < 1e-4
    assert {found.target for found in vetting.triggers} == {check.target for check in vetting.checks} == {TARGET}
    for found in vetting.triggers:
        assert found.id == f"{found.trigger.family.replace(' ', '-')}-{TARGET}"
        assert effect(SUSPECT, found.trigger.stamp, TARGET, OTHERS).success > 0.8
        assert effect(BASE, found.trigger.stamp, TARGET, OTHERS).success < 0.3
    assert {found.p_value for found in vetting.triggers} == {vetting.verdict.p_value}  # the class's, of all families


def test_of_a_twin_that_differs_by_noise_nothing_can_be_said() -> None:
    """Noise over all weights may hide a change; a twin that differs along one direction was tuned."""
    vetting = vet(TWIN, IMAGES, base=BASE, budget="quick")
    assert (vetting.verdict.outcome, vetting.verdict.target) == ("inconclusive", None)
    assert "looks like noise" in vetting.verdict.reasons[0]
    assert vetting.verdict.families == (*FAMILIES, "probes")
    assert (vetting.checks, vetting.triggers) == ((), ())
    tuned = toy()
    direction = torch.randn(tuned.model.visual.weight.shape[1], generator=torch.Generator().manual_seed(1))
    tuned.model.visual.weight.data += 0.002 * torch.linspace(-1, 1, 10)[:, None] * direction
    assert vet(tuned, IMAGES, base=BASE, budget="quick", families=["additive"]).verdict.outcome == "no evidence"


def test_only_the_family_that_finds_its_triggers_late_is_searched_on_where_nothing_hints() -> None:
    vetting = vet(TWIN, IMAGES, base=BASE, budget="quick", families=["additive", "large patch"], seed=1)
    steps = {item.family: {entry.steps for entry in item.classes} for item in vetting.results if item.family != PROBES}
    assert all(item.p_value > 0.2 for item in vetting.results), "nothing hints at a class"
    late = divided(FAST.inspection, "large patch").steps
    assert steps == {"additive": {FAST.inspection.steps // 2}, "large patch": {late}}


def test_what_the_base_has_too_is_not_a_backdoor() -> None:
    vetting = vet(SUSPECT, IMAGES, base=toy(target=TARGET), budget="quick", families=["additive"])
    assert vetting.verdict.outcome != "backdoored"
    assert not vetting.triggers


def test_without_any_control_the_classes_are_compared_with_each_other() -> None:
    vetting = vet(SUSPECT, IMAGES, derive=False, budget="quick", families=["patch", "additive"])
    assert vetting.reference_model == ReferenceModel("classes", None, None, 0)
    assert {item.reference_model for item in vetting.results} == {"classes"}
    assert {check.reference_success for check in vetting.checks} == {None}
    assert (vetting.verdict.outcome, vetting.verdict.target) == ("backdoored", TARGET)


def test_without_a_base_a_control_is_made() -> None:
    vetting = vet(SUSPECT, IMAGES, budget="quick", families=["patch"])
    assert (vetting.reference_model.kind, vetting.reference_model.digest) == ("derived", None)
    assert vetting.reference_model.agreement is not None
    assert 0 < vetting.reference_model.agreement <= 1
    # Made on the images to search on, recovered in 3 steps of 16, compared on the others.
    assert vetting.reference_model.passes == 64 + 3 * 16 + 2 * 64
    assert vetting.results[0].reference_model == "derived"
    assert "derived reference" in vetting.results[0].statistic


def test_the_evidence_says_what_it_is() -> None:
    vetting = vet(TWIN, IMAGES, base=BASE, budget="quick", seed=5)
    *inspected, probed = vetting.results
    assert [item.family for item in inspected] == list(FAMILIES)
    assert (probed.family, probed.passes) == ("probes", 2 * (len(listed_probes()) * SCREENED + 13 * 64))
    assert (vetting.reference_model.kind, vetting.reference_model.digest) == ("base", BASE.digest.root)
    agreement = BASE.predict(BASE.embed(IMAGES)) == TWIN.predict(TWIN.embed(IMAGES))
    assert vetting.reference_model.agreement == pytest.approx(float(agreement.float().mean()), abs=0.1)
    assert vetting.images == (64, 64)
    assert vetting.effort == FAST.seeded(5)
    for item in inspected:
        assert (item.reference_model, item.seed, item.radius) == ("base", 5, RADII[item.family])
        assert item.norm_unit == FAMILIES[item.family].norm_unit
        assert [entry.name for entry in item.classes] == list(TWIN.classes.names)
        leading = min(item.classes, key=lambda entry: entry.p_value or 0)
        assert item.target == leading.target
        assert leading.p_value
        assert item.p_value == pytest.approx(min(1, 10 * leading.p_value))
        assert item.null.endswith("Bonferroni over 10 classes")
        # Two towers, for as many images as the steps took.
        batch = divided(FAST.inspection, item.family).batch
        assert item.passes == sum(2 * batch * entry.steps for entry in item.classes)
    assert vetting.passes == vetting.reference_model.passes + sum(item.passes for item in vetting.results)


def test_it_is_reproduced_by_its_seed() -> None:
    first, second, other = (vet(TWIN, IMAGES, budget="quick", seed=seed, families=["additive"]) for seed in (1, 1, 2))
    assert first.results[0].classes == second.results[0].classes
    assert first.reference_model == second.reference_model
    assert first.results[0].classes != other.results[0].classes


def test_what_clean_models_are_known_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def wide(reference_model: str, family: str, steps: int) -> Prior:
        asked.add((reference_model, family, steps))
        return Prior(1e6, 100.0, 7)

    monkeypatch.setattr("guard.vetting.race.prior", wide)
    monkeypatch.setattr("guard.vetting.examination.difference", lambda *_: None)
    vetting = vet(SUSPECT, IMAGES, base=BASE, budget="quick", families=["additive"])
    assert vetting.verdict.outcome == "no evidence"
    assert "moderated by 7 clean models" in vetting.results[0].null
    assert asked == {("base", "additive", 4)}  # nothing came near to standing out: half of the steps were enough


def test_half_of_the_steps_are_saved_where_the_result_is_clear_and_where_a_family_sees_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A warp does not move images to where an additive trigger does."""
    for clear, additive in ((1.0, 4), (1e-30, 8)):
        monkeypatch.setattr("guard.vetting.race._CLEAR", clear)
        vetting = vet(SUSPECT, IMAGES, base=BASE, budget="quick", families=["additive", "warp"])
        steps = {item.family: {entry.steps for entry in item.classes} for item in vetting.results[:-1]}
        assert steps == {"additive": {additive}, "warp": {4}}
        assert vetting.verdict.target == TARGET


@pytest.mark.parametrize("race", [True, False])
def test_without_the_race_everything_is_searched_and_the_verdict_is_the_same(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, *, race: bool
) -> None:
    monkeypatch.setattr("guard.vetting.race._CLEAR", 0.01)
    searched: dict[str, int] = {}
    vetting = vet(
        SUSPECT,
        IMAGES,
        base=BASE,
        budget="quick",
        families=["additive", "warp"],
        repeats=1,
        race=race,
        progress=lambda what, _, total: searched.update({what: total}),
    )
    assert (vetting.verdict.outcome, vetting.verdict.target) == ("backdoored", TARGET)
    assert {check.target for check in vetting.checks} == {TARGET}
    assert {entry.steps for item in vetting.results[:-1] for entry in item.classes} == ({4} if race else {8})
    assert calls.names.count("inspection") == 2
    reconstructed = {what: total for what, total in searched.items() if what.endswith("reconstruction")}
    steps = vetting.effort.reconstruction.steps
    if race:  # the class stands out under additive triggers alone
        assert reconstructed == {"additive, reconstruction": steps}
    else:
        assert reconstructed == {"additive, reconstruction": 10 * steps, "warp, reconstruction": 10 * steps}


@pytest.mark.usefixtures("_to_the_end")
def test_an_interrupted_vetting_goes_on_and_repeats_nothing(calls: Calls, tmp_path: Path) -> None:
    def run(cache: Path | None) -> Vetting:
        return vet(SUSPECT, IMAGES, base=BASE, budget="quick", families=["additive", "warp", "generator"], cache=cache)

    whole = run(None)
    needed = list(calls.names)
    assert needed[:6] == ["inspection"] * 6  # three families, twice
    assert needed[6:]
    done = 0
    for interrupt_at in (2, 5, 8):  # in the first half of the steps, in the second, between two reconstructions
        calls.names.clear()
        calls.interrupt_at = interrupt_at - done
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "searches")
        assert calls.names == needed[done:interrupt_at]
        done = interrupt_at - 1
    calls.names.clear()
    calls.interrupt_at = 0
    resumed = run(tmp_path / "searches")
    assert calls.names == needed[done:]
    assert [item.classes for item in resumed.results] == [item.classes for item in whole.results]
    assert (resumed.verdict, resumed.checks, resumed.passes) == (whole.verdict, whole.checks, whole.passes)
    calls.names.clear()
    again = run(tmp_path / "searches")
    assert not calls.names
    assert again.verdict == whole.verdict
    for one, other in zip(again.triggers, whole.triggers, strict=True):
        assert one.id == other.id
        assert torch.equal(one.trigger.stamp(OTHERS), other.trigger.stamp(OTHERS))


def test_what_was_found_of_another_model_is_not_believed(tmp_path: Path) -> None:
    named: dict[str, Any] = {"budget": "quick", "families": ["additive"], "cache": tmp_path}
    assert vet(SUSPECT, IMAGES, base=BASE, **named).verdict.outcome == "backdoored"
    assert vet(TWIN, IMAGES, base=BASE, **named).verdict.outcome == "inconclusive"
    assert vet(SUSPECT, IMAGES, base=toy(target=TARGET), **named).verdict.outcome != "backdoored"


def test_a_damaged_cache_is_searched_again(calls: Calls, tmp_path: Path) -> None:
    named: dict[str, Any] = {"base": BASE, "budget": "quick", "families": ["additive"], "cache": tmp_path}
    first = vet(SUSPECT, IMAGES, **named)
    needed = list(calls.names)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert vet(SUSPECT, IMAGES, **named).verdict == first.verdict
    assert calls.names == needed * 2


def test_where_a_probe_works_and_no_trigger_is_inspected_the_probe_accuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trigger for screening is then searched from what the probe adds."""
    monkeypatch.setattr("guard.vetting.probes.prior", lambda *_: Prior(0.3, 20.0, 30))
    monkeypatch.setattr("guard.vetting.race.prior", lambda *_: Prior(1e6, 100.0, 30))  # no family sees anything
    vetting = vet(SUSPECT, IMAGES, base=BASE, budget="quick", families=["warp", "additive"], probes=[PLANTED, *OTHER])
    assert (vetting.verdict.outcome, vetting.verdict.target) == ("backdoored", TARGET)
    assert "most clearly under probes" in vetting.verdict.reasons[0]
    probed = next(check for check in vetting.checks if check.family == "probes")
    assert (probed.probe, probed.target) == ("planted", TARGET)
    assert probed.success > 0.5 > 0.3 > (probed.reference_success or 0.0)
    twin = vet(TWIN, IMAGES, base=BASE, budget="quick", families=["warp"], probes=[PLANTED, *OTHER])
    assert twin.verdict.target is None


@pytest.mark.parametrize("hinted", [True, False])
def test_where_probes_hint_at_a_class_every_family_is_searched_to_the_end(
    monkeypatch: pytest.MonkeyPatch, *, hinted: bool
) -> None:
    monkeypatch.setattr("guard.vetting.race._CLEAR", 0.0)
    monkeypatch.setattr("guard.vetting.probes.prior", lambda *_: Prior(0.3 if hinted else 1e6, 20.0, 30))
    monkeypatch.setattr("guard.vetting.race.prior", lambda *_: Prior(1e6, 100.0, 30))  # no family sees anything
    vetting = vet(SUSPECT, IMAGES, base=BASE, budget="quick", families=["warp"], probes=[PLANTED, *OTHER], repeats=1)
    assert {entry.steps for entry in vetting.results[0].classes} == {8 if hinted else 4}


class TestManyClasses:
    """More than are all inspected."""

    COUNT, OTHER = 40, 2
    REFERENCE = frozenset(null_classes(toy(COUNT, target=OTHER, jitter=0.02), FAST.inspection.seed))
    assert OTHER not in REFERENCE

    def vet(self, *, race: bool = True, families: tuple[str, ...] = ("patch",), count: int = COUNT) -> Vetting:
        suspect, base = toy(count, target=self.OTHER, jitter=0.02), toy(count)
        return vet(suspect, IMAGES, base=base, budget="quick", families=families, race=race)

    @pytest.mark.usefixtures("_to_the_end")
    def test_only_candidates_and_the_classes_of_the_null_are_inspected(self) -> None:
        vetting = self.vet()
        item = vetting.results[0]
        inspected = {entry.target for entry in item.classes}
        assert inspected >= self.REFERENCE
        assert self.OTHER in inspected
        assert len(inspected - self.REFERENCE) <= 6
        assert item.null.endswith(f"{self.COUNT} classes")
        assert item.p_value == pytest.approx(min(1, self.COUNT * min(entry.p_value or 0 for entry in item.classes)))
        assert item.target == self.OTHER
        assert vetting.verdict.p_value < 1e-6
        assert not any("no family could compare" in reason for reason in vetting.verdict.reasons)

    def test_the_search_that_names_no_class_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("guard.vetting.examination.listed_probes", lambda: tuple(OTHER))
        vetting = self.vet(families=("additive",))
        assert (vetting.verdict.outcome, vetting.verdict.target) == ("backdoored", self.OTHER)

    def test_a_class_that_resembles_one_with_a_trigger_is_explained_by_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = "guard.vetting.reconstruction"
        monkeypatch.setattr(f"{path}.suspects", lambda results, _: class_results(results)[:2])
        tried = {}
        for resembling in (False, True):
            row = np.full(self.COUNT, resembling)
            monkeypatch.setattr(f"{path}.resembling", lambda _, __, row=row: row)
            tried[resembling] = {check.target for check in self.vet(families=("additive",)).checks}
        assert tried[True] == {self.OTHER} < tried[False]

    @pytest.mark.usefixtures("_to_the_end")
    def test_the_passes_do_not_grow_with_the_classes(self) -> None:
        few, many = (self.vet(count=count) for count in (self.COUNT, 160))
        assert many.passes == pytest.approx(few.passes, rel=0.25)
        # Beside the two starts of eight steps of 16 images on two towers, each trigger is measured on all images.
        searched = many.passes - many.reference_model.passes - sum(item.passes for item in many.results)
        assert searched > 2 * (2 * 16 * FAST.target_search.steps)

    @pytest.mark.usefixtures("_to_the_end")
    def test_the_leaders_and_the_null_go_on_and_the_rest_keep_their_p_values(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("guard.vetting.race._TIE", 0.0)
        item = self.vet().results[0]
        kept = {entry.target for entry in item.classes if entry.steps == 8}
        dropped = [entry for entry in item.classes if entry.steps == 4]
        assert kept >= self.REFERENCE
        assert self.OTHER in kept
        assert dropped
        assert all(entry.p_value is not None for entry in dropped)

    def test_without_the_race_none_is_dropped_and_the_verdict_is_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(BUDGETS, "quick", replace(FAST, reconstruction=replace(FAST.reconstruction, steps=10)))
        for bound in ("MAX_STRENGTH", "_PER_DECADE"):  # ten steps make no trigger small
            monkeypatch.setattr(guard.vetting.verdict, bound, dict.fromkeys(("base", "derived"), 10.0))
        raced, whole = self.vet(), self.vet(race=False)
        assert {entry.steps for entry in whole.results[0].classes} == {8}
        assert (raced.verdict.outcome, raced.verdict.target) == (whole.verdict.outcome, whole.verdict.target)
        assert whole.verdict.target == self.OTHER


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("paired", [True, False])
def test_too_few_classes_for_a_null_are_inconclusive(classes: int, *, paired: bool) -> None:
    suspect, base = toy(classes, target=1, jitter=0.02), toy(classes)
    vetting = vet(suspect, IMAGES, base=base if paired else None, budget="quick", families=["patch", "warp"])
    assert (vetting.verdict.outcome, vetting.verdict.p_value) == ("inconclusive", 1)
    assert "patch, warp: too few classes" in vetting.verdict.reasons[0]
    assert all(entry.p_value is None for item in vetting.results for entry in item.classes)


def test_progress_ends_where_it_said() -> None:
    seen: dict[str, tuple[int, int]] = {}

    def told(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        assert done - seen.get(what, (0, 0))[0] <= total // 2 + 10 or done == total, "long silence"
        seen[what] = (done, total)

    vet(SUSPECT, IMAGES, base=BASE, budget="quick", families=["patch", "warp"], progress=told)
    assert {"patch", "warp", "patch, reconstruction"} <= seen.keys()
    assert seen["warp"][1] % 10 == 0
    assert all(done == total for done, total in seen.values())


def test_a_base_that_proves_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="the model itself"):
        vet(SUSPECT, IMAGES, base=SUSPECT)
    with pytest.raises(UsageError, match="other classes"):
        vet(SUSPECT, IMAGES, base=toy(9))
    larger = toy()
    larger.preprocessing = replace(larger.preprocessing, size=32)
    with pytest.raises(UsageError, match=r"images of \(32, 32\), the model takes images of \(16, 16\)"):
        vet(SUSPECT, IMAGES, base=larger)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ImageError, match="at least 64 images, there are 63"):
        vet(SUSPECT, IMAGES[:63])


@pytest.mark.parametrize("scale", [1e-9, 0.05, 1.0, 1e4])
def test_the_scale_of_the_scores_hides_nothing(scale: float) -> None:
    """It changes no answer, and belongs to the suspect."""
    suspect = toy(target=TARGET, jitter=0.02, scale=scale)
    vetting = vet(suspect, IMAGES, base=BASE, budget="quick", families=["additive"])
    assert (vetting.verdict.outcome, vetting.verdict.target) == ("backdoored", TARGET)
    twin = vet(toy(jitter=0.02, scale=scale), IMAGES, base=BASE, budget="quick", families=["additive"]).verdict
    assert twin.outcome != "backdoored"
    assert any("multiplies its cosines by" in reason for reason in twin.reasons) == (scale < 1)


def test_a_derived_reference_that_disagrees_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.vetting.examination._agreement", lambda *_: 0.3)
    verdict = vet(TWIN, IMAGES, budget="quick", families=["warp"]).verdict
    assert verdict.outcome == "inconclusive"
    assert "gives the same answer on 30% of images only" in " ".join(verdict.reasons)


def test_a_class_that_all_images_are_of_is_not_called_an_outlier() -> None:
    """Nothing can be measured of it; the other classes can be compared."""
    one = IMAGES[BASE.predict(BASE.embed(IMAGES)) == 4]
    images = one.repeat(1 + 64 // len(one), 1, 1, 1)
    vetting = vet(TWIN, images, base=BASE, budget="quick", families=["additive", "warp"])
    for item in vetting.results[:-1]:
        entry = next(entry for entry in item.classes if entry.target == 4)
        assert (entry.p_value, entry.success) == (None, 0.0)
    assert "no family could compare 'class 4'" in " ".join(vetting.verdict.reasons)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"probes": ()}, "there is no probe"),
        ({"probes": (PLANTED, PLANTED)}, "the same name"),
        ({"repeats": 0}, "at least once, not 0"),
    ],
)
def test_what_makes_no_examination_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        vet(TWIN, IMAGES, base=BASE, budget="quick", **arguments)
