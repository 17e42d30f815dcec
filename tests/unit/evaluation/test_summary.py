from dataclasses import replace
from pathlib import Path

import pytest

from guard.evaluation import Detection, Evaluation, EvaluationSettings, Features, Result, Truth, Zoo, summarise
from guard.evaluation.markdown import render
from guard.evaluation.plots import draw
from guard.evaluation.results import Recovery, ScoreFigures, Screening, ThresholdFigures
from guard.evaluation.statistics import auroc
from guard.vetting import Conclusion


def result(model: str, outcome: Conclusion, suspicion: float, leading: int = 0, cosine: float | None = None) -> Result:
    recovery = None if cosine is None else Recovery("patch-0", 0, 0.9, cosine, cosine / 2)
    target = leading if outcome == "backdoored" else None
    detection = Detection(outcome, target, leading, 0.5, suspicion, (), (), recovery, 1000)
    return Result(
        1, "k", model, "vetting-derived", "1", "1.2.3", "d", None, 0, {}, "cpu", 1, 10.0, detection, None
    )  # fmt: skip


def truth(label: str, family: str) -> Truth:
    targets = () if label == "clean" else (0,)
    return Truth(label, f"{family}-tiny", family, targets, (), (), 0.9, 0.8)  # type: ignore[arg-type]


TRUTHS = {
    "b1": truth("backdoored", "badnets"),
    "b2": truth("backdoored", "badnets"),
    "b3": truth("backdoored", "warp"),
    "c1": truth("clean", "benign"),
    "c2": truth("clean", "benign"),
    "c3": truth("clean", "base"),
    "f1": truth("failed attack", "warp"),
    "f2": truth("failed attack", "warp"),
}
RESULTS = [
    result("b1", "backdoored", 5, leading=0, cosine=0.9),
    result("b2", "backdoored", 4, leading=3, cosine=0.5),
    result("b3", "inconclusive", 0.5, leading=0),
    result("c1", "no evidence", 0),
    result("c2", "backdoored", 3, cosine=0.1),
    result("c3", "inconclusive", 1),
    result("f1", "backdoored", 9, cosine=0.2),
    result("f2", "no evidence", 0),
]


def evaluation(results: list[Result]) -> Evaluation:
    return Evaluation(
        zoo=Zoo(Path("zoo"), "tiny", {}, 0),
        methods=("vetting-derived", "screening"),
        settings=EvaluationSettings("quick"),
        truths=dict(TRUTHS),
        results={(item.model, item.method): item for item in results},
        features={(item.model, item.method): Features() for item in results},
        skipped={"screening": ("c3",)},
        failures=(),
        fresh=2,
        seconds=20.0,
    )


@pytest.fixture
def whole() -> Evaluation:
    return evaluation(RESULTS)


def test_counts_per_family_and_kind(whole: Evaluation) -> None:
    (method,) = summarise(whole).detection
    found = {item.flagged.group: item for item in method.found}
    assert list(found) == ["badnets", "warp", "all"]
    everything = found["all"].flagged
    assert (everything.models, everything.inconclusive) == (3, 1)
    assert everything.flagged
    assert everything.conclusive
    assert (everything.flagged.count, everything.flagged.total) == (2, 3)
    assert (everything.conclusive.count, everything.conclusive.total) == (2, 2)
    assert found["warp"].flagged.conclusive is None
    assert found["badnets"].top1
    assert found["badnets"].top1.count == 1
    assert found["badnets"].cosine
    assert found["badnets"].cosine.value == pytest.approx(0.7)
    assert found["badnets"].cosine.count == 2
    assert found["warp"].cosine is None
    alarms = {item.group: (item.flagged.count if item.flagged else None, item.models) for item in method.false_alarms}
    assert alarms == {"base": (0, 1), "benign": (1, 2), "all": (1, 3)}


def test_families_are_ranked_against_all_clean_models(whole: Evaluation) -> None:
    (method,) = summarise(whole).detection
    areas = {item.flagged.group: item.auroc for item in method.found}
    assert areas["badnets"] == auroc([5, 4], [0, 3, 1])
    assert areas["all"] == auroc([5, 4, 0.5], [0, 3, 1])


def test_failed_attacks_count_nowhere_else(whole: Evaluation) -> None:
    (method,) = summarise(whole).detection
    assert (method.failed.models, method.failed.flagged.count if method.failed.flagged else None) == (2, 1)
    without = evaluation([item for item in RESULTS if not item.model.startswith("f")])
    (other,) = summarise(without).detection
    assert (other.found, other.false_alarms, other.cliptrace) == (method.found, method.false_alarms, method.cliptrace)
    assert "Of 2 failed attacks, which count nowhere above, 1 were flagged" in render(summarise(whole))


def test_the_tables_show_models_rates_and_what_was_skipped(whole: Evaluation) -> None:
    text = render(summarise(whole))
    assert "8 models: 3 backdoored, 3 clean, 2 failed attack." in text
    assert "| all | 3 | " in text
    assert "66.7% (2/3; 9.4%–99.2%) | 1 | 100.0% (2/2; 15.8%–100.0%)" in text
    assert "| b2 | badnets-tiny | backdoored | 0.900 | 0.800 | backdoored, class 3 (p = 0.5) |" in text
    assert "Skipped by screening for lack of a base, calibration images or requests (1): c3" in text


def test_screening_is_shown_by_what_vetting_found(whole: Evaluation) -> None:
    def screened(model: str, triggers: int, detected: int, false_alarms: int) -> Result:
        held = (
            ThresholdFigures(0.01, 1.0, false_alarms, 100, detected, 50),
            ThresholdFigures(0.001, None, 0, 100, 0, 50),
        )
        area = (auroc([2, 1], [0, 1]),)
        figures = ScoreFigures("trigger match", 2, 40, 120, area, held)
        density = replace(figures, score="k-distance", auroc=(auroc([0], [0]),))
        return replace(
            whole.results[model, "vetting-derived"],
            method="screening",
            detection=None,
            screening=Screening(triggers, figures if triggers else density, density),
        )

    extra = [screened("b1", 1, 50, 2), screened("b2", 2, 40, 0), screened("b3", 0, 5, 1), screened("f1", 1, 0, 9)]
    items = {(item.group, item.score): item for item in summarise(evaluation([*RESULTS, *extra])).screening}
    assert set(items) == {
        ("badnets, vetting found triggers", "as vetted"),
        ("badnets, vetting found triggers", "density"),
        ("backdoored, vetting found triggers", "as vetted"),
        ("backdoored, vetting found triggers", "density"),
        ("backdoored, vetting found none", "density"),
    }
    found = items["backdoored, vetting found triggers", "as vetted"]
    assert found.auroc
    assert found.auroc.value == pytest.approx(0.875)
    supported, unsupported = found.thresholds
    assert supported.detected
    assert (supported.detected.count, supported.detected.total) == (90, 100)
    assert supported.false_alarms
    assert (supported.false_alarms.count, supported.false_alarms.total) == (2, 200)
    assert (unsupported.unsupported, unsupported.detected) == (2, None)
    text = render(summarise(evaluation([*RESULTS, *extra])))
    assert "| backdoored, vetting found none | density | 1 | 0.500" in text
    assert "| not supported | not supported |" in text


def test_plots_are_the_same_for_the_same_results(whole: Evaluation) -> None:
    plots = draw(whole)
    assert set(plots) == {"roc.svg", "suspicion-vetting-derived.svg"}
    assert plots == draw(whole)
    assert "failed attack: warp (2)" in plots["suspicion-vetting-derived.svg"]
    assert "3 backdoored, 3 clean" in plots["roc.svg"]
    assert draw(evaluation([RESULTS[0]])) == {}  # without clean models there is no curve
