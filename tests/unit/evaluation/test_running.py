import json
import math
import operator
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from guard.classifiers import Classifier, ImageFolder
from guard.distributed import Processes
from guard.errors import UsageError
from guard.evaluation import Evaluation, EvaluationSettings, Zoo, evaluate
from guard.evaluation.images import ImageSet
from guard.evaluation.running import _run
from guard.vetting import Vetting, agreed, judge
from tests.conftest import random_images
from tests.zoo import TARGET, FakeVetting, evidence_of, make_zoo, write_images, write_truth

METHODS = ("vetting-base", "vetting-derived", "screening")
SETTINGS = EvaluationSettings("quick", alphas=(0.05, 0.001), device="cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoos") / "tiny")


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "zoo"))


@pytest.fixture
def vet(monkeypatch: pytest.MonkeyPatch) -> FakeVetting:
    fake = FakeVetting("attacked", "tried")
    monkeypatch.setattr("guard.evaluation.subject.vet", fake)
    return fake


def run(root: Path, *methods: str, **more: object) -> Evaluation:
    out, names = root / "evaluation", methods or METHODS
    return evaluate(Zoo.read(root), out, methods=names, settings=SETTINGS, **more)  # type: ignore[arg-type]


def test_what_is_finished_is_not_done_again(root: Path, vet: FakeVetting) -> None:
    first = run(root, "vetting-base")
    assert sorted(vet.calls) == ["attacked", "benign", "tried"]
    again = run(root, "vetting-base")
    assert len(vet.calls) == 3
    assert (first.fresh, again.fresh) == (3, 0)
    assert again.results == first.results
    (root / "evaluation" / "benign" / "vetting-base.json").write_text('{"format": 1')  # cut short
    assert run(root, "vetting-base").fresh == 1
    assert vet.calls[3:] == ["benign"]


def test_other_settings_another_truth_and_other_images_are_done_again(root: Path, vet: FakeVetting) -> None:
    run(root, "vetting-derived", models="attacked")
    seeded = EvaluationSettings("quick", seed=1, device="cpu")
    evaluate(Zoo.read(root), root / "evaluation", methods=["vetting-derived"], settings=seeded, models="attacked")
    assert len(vet.calls) == 2
    run(root, "vetting-derived", models="attacked")
    write_truth(root, "attacked", "backdoored", "blended")
    run(root, "vetting-derived", models="attacked")
    (root / "images" / "random" / "vetting" / "0000.png").unlink()
    assert run(root, "vetting-derived", models="attacked").fresh == 1
    assert len(vet.calls) == 5


def test_alphas_concern_screening_only(root: Path, vet: FakeVetting) -> None:
    run(root, models="attacked")
    settings = EvaluationSettings("quick", alphas=(0.1,), device="cpu")
    again = evaluate(Zoo.read(root), root / "evaluation", methods=METHODS, settings=settings, models="attacked")
    assert again.fresh == 1
    assert vet.calls


def test_a_model_without_a_base_is_skipped_where_one_is_needed(root: Path, vet: FakeVetting) -> None:
    done = run(root)
    assert done.skipped == {"vetting-base": ("base",)}
    assert ("base", "vetting-derived") in done.results
    assert done.results["attacked", "vetting-base"].base == done.results["base", "vetting-derived"].digest
    assert done.results["attacked", "vetting-derived"].base is None
    assert vet.calls.count("attacked") == 2  # screening uses what vetting-base found


def test_a_reconstruction_is_measured_against_the_truth(root: Path, vet: FakeVetting) -> None:
    done = run(root, "vetting-base", "screening", models="attacked")
    detection = done.results["attacked", "vetting-base"].detection
    assert detection
    assert detection.recovery
    assert (detection.outcome, detection.target, detection.leading) == ("backdoored", TARGET, TARGET)
    # The fake reconstruction is the attacker's own trigger; only the images differ.
    assert detection.recovery.cosine == pytest.approx(1, abs=0.05)
    assert detection.recovery.centred_cosine == pytest.approx(1, abs=0.1)
    features = done.features["attacked", "vetting-base"]
    assert features.recovered is not None
    assert features.true is not None
    assert float(features.true[0] @ features.recovered) == pytest.approx(detection.recovery.cosine)
    screening = done.results["attacked", "screening"].screening
    assert screening
    assert (screening.triggers, screening.vetted.score, screening.density.score) == (
        1,
        "match and density",
        "k-distance",
    )
    assert screening.vetted.auroc[0].value > 0.95
    supported, too_small = screening.vetted.held
    assert supported.triggered == 40  # requests of the target class carry no trigger
    assert supported.clean == 60
    assert supported.detected > 35
    assert too_small.threshold is None
    assert vet.calls == ["attacked"]


def test_what_only_some_seeds_accuse_ranks_below_what_is_accused(
    root: Path, vet: FakeVetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(classifier: Classifier, images: Tensor, **named: Any) -> Vetting:
        accusing = vet(classifier, images, **named)
        if not classifier.source.endswith("attacked"):
            return accusing
        results = (evidence_of([0.5] * len(accusing.results[0].classes)),)
        silent = replace(accusing, results=results, checks=(), triggers=(), verdict=judge(results, ()))
        return agreed([silent, accusing, accusing])

    monkeypatch.setattr("guard.evaluation.subject.vet", undecided)
    done = run(root, "vetting-base")
    detections = {name: result.detection for (name, _), result in done.results.items() if result.detection}
    assert detections["attacked"].outcome == "inconclusive"
    assert detections["tried"].outcome == "backdoored"
    assert detections["benign"].suspicion < detections["attacked"].suspicion < detections["tried"].suspicion


@pytest.mark.usefixtures("vet")
def test_requests_of_classes_that_are_no_source_of_the_attack_carry_no_trigger(root: Path) -> None:
    write_truth(root, "attacked", "backdoored", "badnets", trigger_sources=[[2]])

    done = run(root, "screening", models="attacked")
    screening = done.results["attacked", "screening"].screening
    assert screening
    assert screening.vetted.held[0].triggered == 20


@pytest.mark.parametrize(
    ("sources", "reason"), [([[4]], "of a class that the trigger is made for"), ([[9]], "names the class 9")]
)
def test_source_classes_that_do_not_occur_are_a_failure_of_the_model(
    root: Path, vet: FakeVetting, sources: list[list[int]], reason: str
) -> None:
    write_truth(root, "attacked", "backdoored", "badnets", trigger_sources=sources)
    done = run(root, "screening", models="attacked")
    (failure,) = done.failures
    assert reason in failure.reason
    assert vet.calls == ["attacked"]


def test_one_bad_model_does_not_cost_the_others(root: Path, vet: FakeVetting) -> None:
    (root / "models" / "attacked" / "open_clip_model.safetensors").write_bytes(b"\x80 a pickle")
    write_truth(root, "benign", "clean", "benign", digest="0" * 64)
    (root / "truth" / "tried.json").write_text('{"label": "innocent"}')
    done = run(root, "vetting-derived")
    reasons = {failure.model: failure.reason for failure in done.failures}
    assert set(reasons) == {"attacked", "benign", "tried"}
    assert "is a pickle" in reasons["attacked"]
    assert "is of another model" in reasons["benign"]
    assert "label" in reasons["tried"]
    assert list(done.results) == [("base", "vetting-derived")]
    assert vet.calls == ["base"]


def test_a_zoo_that_is_still_being_built_is_evaluated_as_far_as_it_is_there(root: Path, vet: FakeVetting) -> None:
    shutil.rmtree(root / "models" / "benign")
    (failure,) = run(root, "vetting-derived").failures
    assert failure.model == "benign"
    assert "there is no model" in failure.reason
    assert len(vet.calls) == 3


def test_an_error_of_any_kind_is_a_failure_of_its_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nand a long trace")

    monkeypatch.setattr("guard.evaluation.subject.vet", explode)
    (failure,) = run(root, "vetting-base", "vetting-derived", models="benign").failures
    assert failure.reason == "RuntimeError: out of memory and a long trace"
    assert failure.methods == ("vetting-base", "vetting-derived")


def test_a_process_that_dies_takes_only_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Any] = [partial(os._exit, 9), partial(int, "7")]
    for task, name in zip(tasks, ("heavy", "light"), strict=True):
        task.model, task.methods = name, ("vetting-derived",)
        task.zoo = SimpleNamespace(models={name: SimpleNamespace(base=None)})
    monkeypatch.setattr("guard.evaluation.running._work", operator.call)  # a task is then what its process does
    outcomes: dict[str, Any] = {task.model: outcome for task, outcome in _run(tasks, Processes(1), print)}
    (failure,) = outcomes["heavy"].failures
    assert (failure.model, failure.methods) == ("heavy", ("vetting-derived",))
    assert "the process that worked on it died" in failure.reason
    assert outcomes["light"] == 7


def test_withheld_labels_and_flat_requests_are_no_obstacle(root: Path, vet: FakeVetting) -> None:
    shutil.rmtree(root / "truth")
    requests = root / "images" / "random" / "requests"
    shutil.rmtree(requests)
    write_images(requests, random_images(40, seed=9))
    done = run(root)
    assert vet.calls
    assert not any(done.truths.values())
    detection = done.results["attacked", "vetting-derived"].detection
    assert detection
    assert detection.recovery
    assert detection.recovery.cosine is None
    assert detection.recovery.success is not None
    screening = done.results["attacked", "screening"].screening
    assert screening
    assert screening.vetted.auroc == ()
    assert screening.vetted.held[0].clean == 40


def test_what_needs_missing_images_is_not_measured(root: Path, vet: FakeVetting) -> None:
    shutil.rmtree(root / "images" / "random" / "requests")
    done = run(root, models="attacked")
    assert vet.calls == ["attacked", "attacked"]
    assert done.skipped == {"screening": ("attacked",)}
    detection = done.results["attacked", "vetting-derived"].detection
    assert detection
    assert detection.recovery
    assert (detection.recovery.success, detection.recovery.cosine) == (None, None)


def test_a_folder_of_images_is_split_without_overlap(image_folder: Path) -> None:
    split = ImageSet.of_folder(image_folder, vetting=100, seed=0)
    parts = [split.vetting, split.calibration, split.requests]
    files = [set(part.files) if part else set() for part in parts]
    assert [len(part) for part in files] == [100, 133, 67]
    assert set.union(*files) == set(ImageFolder.scan(image_folder).files)
    all_used = ImageSet.of_folder(image_folder, vetting=1000, seed=0)
    assert (all_used.calibration, all_used.requests) == (None, None)


def test_wrong_usage(root: Path, vet: FakeVetting) -> None:
    with pytest.raises(UsageError, match="no method 'magic'; there are vetting-base"):
        run(root, "magic")
    with pytest.raises(UsageError, match="no model has what this needs"):
        run(root, "vetting-base", models="base")
    (root / "evaluation").rmdir()
    (root / "evaluation").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write to"):
        run(root)
    assert not vet.calls


def test_what_is_ranked_is_told_apart_where_the_verdict_says_one(root: Path, vet: FakeVetting) -> None:
    """Corrected p-values of clean models are cut off at 1 in the verdict; in the ranking they are not."""
    done = run(root, "vetting-derived")
    ranked = {model: item.detection for (model, _), item in done.results.items()}
    assert ranked["attacked"]
    assert ranked["attacked"].suspicion == pytest.approx(4.22, abs=0.01)  # −log10(1e-5 × 6 classes)
    assert ranked["benign"]
    assert ranked["benign"].p_value == 1
    assert ranked["benign"].suspicion == pytest.approx(-0.477, abs=0.001)  # −log10(0.5 × 6 classes)
    assert [check.target for check in ranked["attacked"].checks] == [TARGET]
    assert ranked["attacked"].families[0].statistics == (0.0,) * 6
    assert vet.calls


@pytest.mark.parametrize("method", ["clip-inspector", "decree"])
def test_published_methods_judge_by_their_own_rules(root: Path, vet: FakeVetting, method: str) -> None:
    """Neither vets, neither has a p-value or a family, and both give a number to rank by."""
    result = run(root, method, models="benign").results["benign", method]
    assert result.detection
    assert (result.detection.p_value, result.detection.families, result.detection.checks) == (None, (), ())
    assert result.detection.outcome in {"backdoored", "no evidence"}
    assert math.isfinite(result.detection.suspicion)
    assert result.detection.passes > 0
    assert not vet.calls


def test_results_are_json_that_anybody_can_read(root: Path, vet: FakeVetting) -> None:
    run(root, "vetting-derived", models="attacked")
    document = json.loads((root / "evaluation" / "attacked" / "vetting-derived.json").read_text())
    assert document["detection"]["outcome"] == "backdoored"
    assert document["settings"]["effort"]["inspection"]["seed"] == 0
    assert vet.calls == ["attacked"]
