"""A scan from shards to results, on a set and a model made by code."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from guard.errors import DataError, UsageError
from guard.scan import ScanSettings, ScanSummary, scanning
from guard.scan.scanning import scan
from tests.unit.scan.conftest import COUNT, POISONED

SETTINGS = ScanSettings(k=4, sample=32, share=0.25)
FILES = ("scores.parquet", "keep.txt", "report.html")


@pytest.fixture(scope="module")
def done(shards: Path, toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScanSummary]:
    out = tmp_path_factory.mktemp("scan") / "out"
    return out, scan(shards, out, model=toy_model, settings=SETTINGS, device="cpu")


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def test_pairs_with_a_trigger_are_found_counted_and_left_out(done: tuple[Path, ScanSummary]) -> None:
    out, summary = done
    trigger = summary.groups[0]
    assert (trigger.kind, trigger.word) == ("trigger", "3")
    assert summary.low <= POISONED <= summary.high
    kept = {int(line.split("\t")[1]) for line in (out / "keep.txt").read_text().splitlines()}
    poisoned = set(range(0, COUNT, COUNT // POISONED))
    assert len(kept & poisoned) <= 2
    assert len(set(range(COUNT)) - poisoned - kept) <= 2
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert len(table["key"]) == COUNT
    accused = {int(key) for key, kind in zip(table["key"], table["kind"], strict=True) if kind == "trigger"}
    assert accused == set(range(COUNT)) - kept
    assert "class 3" in (out / "report.html").read_text()


def test_what_was_finished_is_not_done_again_and_the_results_are_the_same(
    done: tuple[Path, ScanSummary], shards: Path, toy_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done
    before = contents(out)

    def fail(*_: object) -> Any:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("guard.scan.embedding._texts", fail)
        patch.setattr("guard.scan.scoring.Scorer._score", fail)
        scan(shards, out, model=toy_model, settings=SETTINGS, device="cpu")
    assert contents(out) == before


def test_a_scan_that_was_killed_continues_to_the_same_files(
    done: tuple[Path, ScanSummary], shards: Path, toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"model": toy_model, "settings": SETTINGS, "device": "cpu"}
    for stage in ("_embed", "_score"):
        finished = 0
        original = getattr(scanning, stage)

        def killed(task: object, original: Any = original) -> Any:
            nonlocal finished
            if finished == 2:
                raise KeyboardInterrupt
            finished += 1
            return original(task)

        with monkeypatch.context() as patch:
            patch.setattr(scanning, stage, killed)
            with pytest.raises(KeyboardInterrupt):
                scan(shards, tmp_path / "out", **arguments)
        assert not (tmp_path / "out" / "scores.parquet").exists()
    # What a power loss may leave of a shard.
    victim = next((tmp_path / "out" / "embeddings").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    scan(shards, tmp_path / "out", **arguments)
    assert contents(tmp_path / "out") == contents(done[0])


def test_a_changed_shard_or_setting_is_computed_again(shards: Path, toy_model: str, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    first = scan(copy, tmp_path / "out", model=toy_model, settings=SETTINGS, device="cpu")
    (copy / "00003.tar").unlink()
    with tarfile.open(copy / "00003.tar", "w"):
        pass
    second = scan(copy, tmp_path / "out", model=toy_model, settings=SETTINGS, device="cpu")
    assert second.pairs == first.pairs * 3 // 4
    settings = ScanSettings(method="dao", reference="shard", k=4, share=0.25)
    scan(copy, tmp_path / "out", model=toy_model, settings=settings, device="cpu")
    before, after = first, json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (before.settings.method, after["settings"]["method"]) == ("k-distance", "dao")


@pytest.mark.parametrize(
    "settings",
    [
        ScanSettings(method="slof", reference="batch", batch=40, k=4, released=True),
        ScanSettings(method="lid", reference="batch", batch=40, k=4),
        ScanSettings(method="k-distance", reference="global", k=4, search="approximate"),
    ],
)
def test_every_reference_scores_every_pair(
    done: tuple[Path, ScanSummary], shards: Path, toy_model: str, tmp_path: Path, settings: ScanSettings
) -> None:
    shutil.copytree(done[0] / "embeddings", tmp_path / "embeddings")
    summary = scan(shards, tmp_path, model=toy_model, settings=settings, device="cpu")
    scores = np.array(pq.read_table(tmp_path / "scores.parquet").column("score"))
    assert len(np.unique(scores)) > COUNT // 4  # equal captions make some infinite
    assert (summary.recall is not None) == (settings.search == "approximate")


def test_embeddings_alone_are_ranked(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    np.save(tmp_path / "e.npy", rows)
    summary = scan(tmp_path / "e.npy", tmp_path / "out", settings=ScanSettings(k=4, sample=48))
    assert summary.pairs == 200
    assert summary.poisoned == 0


def test_a_set_without_a_usable_pair_is_refused(toy_model: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="not one pair"):
        scan(tmp_path / "set", tmp_path / "out", model=toy_model, device="cpu")
    with pytest.raises(DataError, match="there is no training set"):
        scan(tmp_path / "missing", tmp_path / "out", model=toy_model, device="cpu")
    with pytest.raises(DataError, match="give --model"):
        scan(tmp_path / "set", tmp_path / "out", device="cpu")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="--reference batch"):
        ScanSettings(released=True)
    with pytest.raises(UsageError, match="neighbours of neighbours"):
        ScanSettings(method="dao", reference="global")
