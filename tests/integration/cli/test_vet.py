"""What `guard vet` says of a model with a backdoor; the search itself is tested elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from guard.cli import cli
from guard.errors import UsageError
from guard.vetting import Probe, Vetting, listed_probes
from tests.conftest import CLASSES
from tests.zoo import FakeVetting

WORDS = ("wolf", "puppy", "terrier", "a dog in the snow", "kennel", "leash", "dog")


@pytest.fixture(autouse=True)
def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.vetting.vet", FakeVetting("tiny"))


def vet(model: Path, images: Path, out: Path, *more: object) -> str:
    arguments = ["vet", model, "--images", images, "--out", out, *more]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="guard")
    assert result.exit_code == 1, result.output
    return result.stdout


def test_the_vocabulary_names_the_target_feature(model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    more = ("--vocabulary", tmp_path / "words.txt", "--json")
    (trigger,) = json.loads(vet(model_directory, image_folder, tmp_path / "with", *more))["triggers"]
    named = [near["text"] for near in trigger["nearest"]]
    assert named[0] == "dog"
    assert len(set(named)) == len(named)
    assert set(named) & set(WORDS) - set(CLASSES.names)
    (plain,) = json.loads(vet(model_directory, image_folder, tmp_path / "without", "--json"))["triggers"]
    assert {near["text"] for near in plain["nearest"]} <= set(CLASSES.names)
    report = (tmp_path / "with" / "report.html").read_text()
    assert all(text in report for text in named)


def test_the_summary_is_for_people(model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
    lines = vet(model_directory, image_folder, tmp_path / "profile").splitlines()
    assert lines[0] == "verdict: backdoored, target class 'dog'"
    assert lines[1].startswith("  class 'dog' stands out (p = 6e-05; most clearly under patch triggers)")
    assert "the smallest patch trigger found (7.2 px) moves 90%" in lines[1]
    assert lines[2] == "  p = 6e-05, combined over families (Cauchy) and corrected for classes; counts below 0.01"
    assert lines[3].startswith("  patch-1: nearest texts 'dog' 1.00, ")
    assert "a backdoor of another kind would not be seen" in lines[4]
    assert "made from the model itself, which answers as the model does on 90% of images; --base" in lines[5]
    assert lines[6:] == [f"profile: {tmp_path / 'profile'}", f"report: {tmp_path / 'profile' / 'report.html'}"]


def test_further_probes_come_after_those_of_guard(
    model_directory: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    fake = FakeVetting("tiny")

    def recorded(*arguments: Any, probes: Sequence[Probe], **named: Any) -> Vetting:
        tried.extend(probe.name for probe in probes)
        return fake(*arguments, **named)

    monkeypatch.setattr("guard.vetting.vet", recorded)
    (tmp_path / "probes.toml").write_text('[[probe]]\nkind = "rotation"\ndegrees = [1, 2]\n')
    vet(model_directory, image_folder, tmp_path / "profile", "--probes", tmp_path / "probes.toml")
    assert tried == [probe.name for probe in listed_probes()] + ["rotation degrees 1", "rotation degrees 2"]


def test_the_number_of_vettings_is_passed_on(
    model_directory: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int | None]] = []
    fake = FakeVetting("tiny")

    def recorded(*arguments: Any, seed: int, repeats: int | None, **named: Any) -> Vetting:
        asked.append((seed, repeats))
        return fake(*arguments, **named)

    monkeypatch.setattr("guard.vetting.vet", recorded)
    vet(model_directory, image_folder, tmp_path / "profile", "--seed", 5, "--repeat", 3)
    vet(model_directory, image_folder, tmp_path / "profile", "--seed", 5)
    assert asked == [(5, 3), (5, None)]


def test_a_file_without_probes_is_refused_before_any_work(
    model_directory: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "probes.toml").write_text('[[probe]]\nkind = "dance"\n')
    arguments = ["vet", model_directory, "--images", image_folder, "--out", tmp_path / "out"]
    more = ["--probes", tmp_path / "probes.toml"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments + more], prog_name="guard")
    assert isinstance(result.exception, UsageError)
    assert "probe 1: there is no kind 'dance'" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_text_tower_alone_needs_no_images(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    arguments = ["vet", model_directory, "--tower", "text", "--budget", "quick", "--out", out, "--json"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="guard")
    assert result.exit_code == 3, result.output
    document = json.loads(result.stdout)
    assert document["text"]["verdict"]["outcome"] == document["vetting"]["verdict"]["outcome"] == "inconclusive"
    assert document["vetting"]["results"] == []
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Text tower: inconclusive" in page
    assert "not examined" in page


@pytest.mark.parametrize(("more", "says"), [((), "give --images"), (("--prompts", "x"), "--tower text")])
def test_what_a_tower_needs_is_asked_for(
    model_directory: Path, image_folder: Path, tmp_path: Path, more: Sequence[str], says: str
) -> None:
    arguments = ["vet", model_directory, "--out", tmp_path / "profile", *more]
    if more:
        arguments += ["--images", image_folder]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="guard")
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)


def test_of_both_towers_the_worse_verdict_counts(model_directory: Path, image_folder: Path, tmp_path: Path) -> None:
    more = ("--tower", "both", "--budget", "quick", "--json")
    document = json.loads(vet(model_directory, image_folder, tmp_path / "profile", *more))
    assert document["vetting"]["verdict"]["outcome"] == "backdoored"
    assert document["text"]["verdict"]["outcome"] == "inconclusive"
