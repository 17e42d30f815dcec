"""`guard evaluate` as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from guard.classifiers import ImageFolder, load, save_hugging_face
from guard.cli import cli
from guard.errors import UsageError, ZooError
from guard.vetting import (
    BUDGETS,
    DerivedReferenceSettings,
    Effort,
    InspectionSettings,
    SearchSettings,
    listed_probes,
)
from guard.vetting.results import FoundTarget
from tests.program import guard
from tests.zoo import FakeVetting, make_zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return make_zoo(tmp_path / "zoo")


@pytest.fixture
def vet(monkeypatch: pytest.MonkeyPatch) -> FakeVetting:
    fake = FakeVetting("attacked")
    monkeypatch.setattr("guard.evaluation.subject.vet", fake)
    return fake


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *(str(argument) for argument in arguments), "--device", "cpu"])


def test_figures_plots_and_a_submission(zoo: Path, vet: FakeVetting, tmp_path: Path) -> None:
    submission = tmp_path / "submission"
    methods = ("--methods", "vetting-base,vetting-derived,screening")
    result = evaluate(zoo, *methods, "--budget", "quick", "--alpha", "0.05", "--submission", submission, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["models"] == {"backdoored": 1, "clean": 2, "failed attack": 1, "unknown": 0}
    assert summary["detection"][0]["cliptrace"]["value"] > 95
    assert json.loads((zoo / "evaluation" / "summary.json").read_text()) == summary
    assert "## vetting-base" in (zoo / "evaluation" / "summary.md").read_text()
    assert (zoo / "evaluation" / "roc.svg").read_text().startswith("<?xml")
    feature = torch.load(submission / "embeddings" / "attacked.pt", weights_only=True)
    assert float(feature.norm()) == pytest.approx(1, abs=1e-5)
    assert "3 models; 1 are MISSING" in result.stderr  # the base has no base to compare with
    assert vet.calls


def test_withheld_labels_give_predictions_only(zoo: Path, vet: FakeVetting, tmp_path: Path) -> None:
    shutil.rmtree(zoo / "truth")
    out = tmp_path / "out"
    result = evaluate(zoo, "--methods", "vetting-derived", "--out", out)
    assert result.exit_code == 0, result.output
    assert "there are no figures; 4 predictions" in result.stdout
    outcomes = {entry["model"]: entry["outcome"] for entry in json.loads((out / "predictions.json").read_text())}
    assert outcomes == {"attacked": "backdoored", **dict.fromkeys(("base", "benign", "tried"), "no evidence")}
    assert not (out / "summary.json").exists()
    assert not (zoo / "evaluation").exists()
    assert vet.calls


def test_hugging_face_models_are_evaluated_and_submitted(zoo: Path, vet: FakeVetting, tmp_path: Path) -> None:
    shutil.rmtree(zoo / "truth")
    for directory in list((zoo / "models").iterdir()):
        classifier = load(str(directory), device="cpu")
        shutil.rmtree(directory)
        save_hugging_face(directory, classifier)
    submission = tmp_path / "submission"
    result = evaluate(zoo, "--methods", "vetting-derived", "--submission", submission)
    assert result.exit_code == 0, result.output
    predictions = json.loads((submission / "predictions.json").read_text())
    assert "attacked" in str(predictions)
    feature = torch.load(submission / "embeddings" / "attacked.pt", weights_only=True)
    assert (feature.shape, feature.dtype) == ((16,), torch.float32)
    assert vet.calls


def test_the_feature_of_a_probe_is_submitted_where_no_trigger_was_reconstructed(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = listed_probes()[0]
    monkeypatch.setattr("guard.evaluation.subject.vet", FakeVetting("attacked", probe=probe.name))
    submission = tmp_path / "submission"
    result = evaluate(zoo, "--methods", "vetting-derived", "--submission", submission)
    assert result.exit_code == 0, result.output
    feature = torch.load(submission / "embeddings" / "attacked.pt", weights_only=True)
    model = load(str(zoo / "models" / "attacked"), device="cpu")
    images = model.read(ImageFolder.scan(zoo / "images" / "random" / "vetting"))
    expected = torch.nn.functional.normalize(model.embed(probe.stamp(images)).mean(0), dim=0)
    torch.testing.assert_close(feature, expected, rtol=1e-3, atol=1e-3)


def test_models_without_a_class_list_are_vetted_with_everyday_things(
    zoo: Path, vet: FakeVetting, tmp_path: Path
) -> None:
    """Their target feature is the one to which the search that names no class concentrated the images most."""
    shutil.rmtree(zoo / "truth")
    for directory in (zoo / "models").iterdir():
        (directory / "classes.json").unlink()
    less, most = torch.eye(16)[:2]
    vet.unnamed = (
        FoundTarget("patch", 0, 0.9, 0.1, less, 0),
        FoundTarget("warp", None, 0.0, 0.8, most, 0),
    )
    result = evaluate(zoo, "--methods", "vetting-base", "--submission", tmp_path / "submission")
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.load(tmp_path / "submission" / "embeddings" / "attacked.pt", weights_only=True), most)
    assert "attacked" in vet.calls


def test_a_damaged_model_is_reported_and_the_rest_is_there(zoo: Path, vet: FakeVetting) -> None:
    (zoo / "models" / "benign" / "open_clip_config.json").write_text("{}")
    result = evaluate(zoo, "--methods", "vetting-derived")
    assert result.exit_code == 4
    assert "FAILED benign (vetting-derived)" in result.stderr
    assert "- FAILED benign: " in (zoo / "evaluation" / "summary.md").read_text()
    assert "| attacked | badnets-tiny | backdoored" in result.stdout
    assert vet.calls.count("attacked") == 1


def test_wrong_usage_is_refused_before_the_work(zoo: Path, vet: FakeVetting, tmp_path: Path) -> None:
    assert isinstance(evaluate(tmp_path / "nowhere").exception, ZooError)
    assert isinstance(evaluate(zoo, "--methods", "magic").exception, UsageError)
    assert "is now called vetting-derived" in str(evaluate(zoo, "--methods", "vetting-self").exception)
    refused = evaluate(zoo, "--methods", "screening,vetting-derived", "--submission", tmp_path / "submission")
    assert isinstance(refused.exception, UsageError)
    assert evaluate(zoo, "--alpha", "1.5").exit_code == 2
    (zoo / "evaluation").symlink_to(tmp_path)
    assert "is a symbolic link" in str(evaluate(zoo).exception)
    assert not vet.calls


def test_a_search_that_two_methods_share_is_made_once(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Effort(InspectionSettings(3, batch=16), SearchSettings(3, batch=16), DerivedReferenceSettings(steps=1))
    monkeypatch.setitem(BUDGETS, "quick", fast)
    arguments = [zoo, "--budget", "quick", "--models", "benign", "--methods"]

    def searches() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (zoo / "evaluation" / ".searches").iterdir()}

    assert evaluate(*arguments, "vetting-base").exit_code == 0
    before = searches()
    assert before
    assert evaluate(*arguments, "screening").exit_code == 0  # with what is found against the base
    assert searches() == before
    assert evaluate(*arguments, "vetting-derived").exit_code == 0
    assert before.items() < searches().items()  # another reference model, other searches


def test_processes_side_by_side(zoo: Path, vet: FakeVetting) -> None:
    # What is found needs no search, which this test could not shorten in other processes.
    assert evaluate(zoo, "--methods", "vetting-derived").exit_code == 0
    assert len(vet.calls) == 4
    (zoo / "models" / "tried" / "open_clip_model.safetensors").write_bytes(b"")
    result = guard("evaluate", zoo, "--methods", "vetting-derived", "--jobs", "2", "--json")
    assert result.returncode == 4, result.stderr
    assert "Traceback" not in result.stderr
    summary = json.loads(result.stdout)
    verdicts = {row["name"]: len(row["verdicts"]) for row in summary["rows"]}
    assert verdicts == {"attacked": 1, "base": 1, "benign": 1, "tried": 0}
    assert [model for model, _ in summary["failures"]] == ["tried"]
