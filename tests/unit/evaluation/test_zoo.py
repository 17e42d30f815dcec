import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from guard.errors import ZooError
from guard.evaluation import Zoo

MODEL = {"base": None, "images": "digits"}


def write(root: Path, document: object) -> Path:
    (root / "models" / "a").mkdir(parents=True, exist_ok=True)
    (root / "zoo.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return root


def zoo(models: object, **more: object) -> dict[str, object]:
    return {"format": 1, "name": "small", "seed": 0, "models": models, **more}


def truth(root: Path, **fields: object) -> Zoo:
    (root / "truth").mkdir(exist_ok=True)
    document = {"label": "backdoored", "recipe": "badnets-medium", "family": "badnets", **fields}
    (root / "truth" / "a.json").write_text(json.dumps(document))
    return Zoo.read(write(root, zoo({"a": MODEL})))


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (zoo({"a": MODEL}, format=2), "format"),
        (zoo({}), "models"),
        (zoo({"../../etc": MODEL}), "models"),
        (zoo({"a/b": MODEL}), "models"),
        (zoo({".a": MODEL}), "models"),
        (zoo({"a\n": MODEL}), "models"),
        (zoo({"a" * 101: MODEL}), "models"),
        (zoo({"a": {"base": "../b", "images": "digits"}}), r"models.a.base"),
        (zoo({"a": {"base": None, "images": "/etc"}}), r"models.a.images"),
        (zoo({"a": {"base": None}}), r"models.a.images"),
        (zoo({"a": MODEL}, name="<script>"), "name"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_a_hostile_or_damaged_zoo_is_refused_in_one_line(tmp_path: Path, document: object, reason: str) -> None:
    with pytest.raises(ZooError, match=reason) as caught:
        Zoo.read(write(tmp_path, document))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_list_is_no_zoo(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"is not a zoo: there is no zoo\.json"):
        Zoo.read(tmp_path)


def test_a_list_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (write(tmp_path, "") / "zoo.json").open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(ZooError, match="is larger than"):
        Zoo.read(tmp_path)


def test_models_are_selected_by_pattern_bases_first(tmp_path: Path) -> None:
    for name in ("b-1", "z-base"):
        (tmp_path / "models" / name).mkdir(parents=True)
    suspect = {"base": "z-base", "images": "digits"}
    read = Zoo.read(write(tmp_path, zoo({"a": suspect, "b-1": suspect, "z-base": MODEL})))
    assert read.select("*") == ("z-base", "a", "b-1")
    assert read.select("b-*") == ("b-1",)
    with pytest.raises(ZooError, match="no model of the zoo matches 'c'; it has 3: a, b-1, z-base"):
        read.select("c")


def test_a_truth_that_is_not_there_is_withheld(tmp_path: Path) -> None:
    assert Zoo.read(write(tmp_path, zoo({"a": MODEL}))).truth("a") is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"label": "guilty"}, "label"),
        ({"targets": [-1]}, "targets"),
        ({"targets": ["0"]}, "targets"),
        ({"accuracy": 1.5}, "accuracy"),
        ({"family": "a | b"}, "family"),
        ({"triggers": ["patch"] * 101}, "triggers"),
        ({"triggers": ["patch", "patch", "patch"], "trigger_targets": [0, 1]}, "3 triggers and 2 trigger_targets"),
        ({"triggers": ["patch"]}, "1 triggers and 0 trigger_targets"),
        (
            {"triggers": ["patch"], "trigger_targets": [0], "trigger_sources": [[1], [2]]},
            "1 triggers and 2 trigger_sources",
        ),
        ({"triggers": ["patch"], "trigger_targets": [0], "trigger_sources": [[-1]]}, "trigger_sources"),
        ({"digest": "x"}, "digest"),
    ],
)
def test_a_hostile_or_damaged_truth_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ZooError, match=reason):
        truth(tmp_path, **fields).truth("a")


def test_triggers_of_the_truth(tmp_path: Path) -> None:
    read = truth(tmp_path, triggers=["patch", "additive"], trigger_targets=[3])
    mask, pattern = torch.rand(1, 8, 8), torch.rand(3, 8, 8)
    save_file(
        {"0.mask": mask, "0.pattern": pattern, "1.delta": torch.zeros(3, 8, 8)}, tmp_path / "truth" / "a.safetensors"
    )
    known = read.truth("a")
    assert known is not None
    first, second = read.triggers("a", known)
    assert (first.trigger.family, second.trigger.family) == ("patch", "additive")
    assert (first.target, second.target, first.sources, second.sources) == (3, 3, (), ())
    assert torch.equal(first.trigger.tensors()["mask"], mask)


def test_source_classes_and_cover_samples_of_the_truth(tmp_path: Path) -> None:
    read = truth(
        tmp_path,
        triggers=["additive", "additive"],
        trigger_targets=[3, 4],
        trigger_sources=[[0, 2], []],
        covers=[{"trigger": 0, "name": "other classes", "kept": 0.9, "leaked": 0.0}],
    )
    delta = torch.zeros(3, 8, 8)
    save_file(
        {"0.delta": delta, "1.delta": delta.clone(), "covers.0.0.delta": delta.clone()},
        tmp_path / "truth" / "a.safetensors",
    )
    known = read.truth("a")
    assert known is not None
    first, second = read.triggers("a", known)
    assert (first.sources, second.sources) == ((0, 2), ())


@pytest.mark.parametrize(
    ("family", "tensors", "reason"),
    [
        ("curse", {"0.mask": torch.zeros(1)}, "unknown family 'curse'"),
        ("patch", {"0.mask": torch.zeros(1, 8, 8)}, "make no patch trigger"),
        ("patch", {"0.mask": torch.zeros(5), "0.pattern": torch.zeros(7)}, "make no patch trigger"),
        ("patch", {"0.mask": torch.zeros(4, 1, 8, 8), "0.pattern": torch.zeros(4, 3, 8, 8)}, "mask has shape"),
        ("additive", {"0.delta": torch.full((3, 8, 8), torch.nan)}, "not finite"),
        ("additive", {}, "make no additive trigger"),
    ],
)
def test_tensors_that_make_no_trigger_are_refused(
    tmp_path: Path, family: str, tensors: dict[str, torch.Tensor], reason: str
) -> None:
    read = truth(tmp_path, triggers=[family], trigger_targets=[0])
    save_file(tensors, tmp_path / "truth" / "a.safetensors")
    known = read.truth("a")
    assert known is not None
    with pytest.raises(ZooError, match=reason):
        read.triggers("a", known)


def test_a_damaged_trigger_file_is_refused(tmp_path: Path) -> None:
    read = truth(tmp_path, triggers=["patch"], trigger_targets=[0])
    (tmp_path / "truth" / "a.safetensors").write_bytes(b"\x80 a pickle, perhaps")
    known = read.truth("a")
    assert known is not None
    with pytest.raises(ZooError, match=r"a\.safetensors is damaged"):
        read.triggers("a", known)


def test_the_fingerprint_changes_with_model_and_truth(tmp_path: Path) -> None:
    read = truth(tmp_path)
    (tmp_path / "models" / "a" / "weights").write_bytes(b"1")
    before = read.fingerprint("a")
    (tmp_path / "models" / "a" / "weights").write_bytes(b"2")
    after = read.fingerprint("a")
    assert before["model"] != after["model"]
    assert before["truth.json"] == after["truth.json"]
    truth(tmp_path, accuracy=0.5)
    assert read.fingerprint("a")["truth.json"] != after["truth.json"]
