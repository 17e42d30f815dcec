import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from guard.classifiers import Classifier
from guard.classifiers.digest import PARTS, ClassifierDigest, sha256
from guard.errors import ProfileError, UsageError
from guard.profiles import Profile
from guard.profiles.document import SCHEMA
from guard.screening import Axis

DOCUMENT, TRIGGERS, REFERENCE = "profile.json", "triggers.safetensors", "reference.safetensors"
AXIS = "axis.safetensors"
Tensors = dict[str, NDArray[Any]]


def refused(directory: Path, file: str) -> str:
    with pytest.raises(ProfileError) as caught:
        Profile.open(directory)
    message = str(caught.value)
    assert file in message
    assert str(directory) in message
    assert "\n" not in message
    return message


def document(directory: Path) -> Any:
    return json.loads((directory / DOCUMENT).read_text(encoding="utf-8"))


def change_document(directory: Path, change: Callable[[Any], object]) -> None:
    changed = document(directory)
    change(changed)
    (directory / DOCUMENT).write_text(json.dumps(changed), encoding="utf-8")


def change_tensors(directory: Path, file: str, change: Callable[[Tensors], object]) -> None:
    tensors = {name: values.copy() for name, values in load((directory / file).read_bytes()).items()}
    change(tensors)
    rewrite(directory, file, save(tensors))


def rewrite(directory: Path, file: str, data: bytes) -> None:
    (directory / file).write_bytes(data)
    change_document(directory, lambda changed: changed["files"].update({file: sha256(data)}))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_profile_is_read_as_it_was_written(profile: Profile, profile_directory: Path) -> None:
    read = Profile.open(profile_directory)
    assert asdict(replace(read.document, files={})) == asdict(replace(profile.document, files={}))
    assert set(read.document.files) == {TRIGGERS, REFERENCE, AXIS}
    assert read.triggers.keys() == profile.triggers.keys()
    for name, tensors in profile.triggers.items():
        assert read.triggers[name].keys() == tensors.keys()
        for tensor, values in tensors.items():
            np.testing.assert_array_equal(read.triggers[name][tensor], values)
    assert read.reference is not None
    assert profile.reference is not None
    before, after = profile.reference, read.reference
    for field in ("reference", "head"):
        np.testing.assert_array_equal(getattr(after.banks, field), getattr(before.banks, field))
    for field in ("values", "triggers", "classes"):
        np.testing.assert_array_equal(getattr(after.clean, field), getattr(before.clean, field))
    assert list(after.banks.stamped) == list(before.banks.stamped)
    for name, bank in before.banks.stamped.items():
        np.testing.assert_array_equal(after.banks.stamped[name], bank)
    assert list(after.clean.parts) == list(before.clean.parts)
    requests = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    judged, again = profile.detector().score(requests), read.detector().score(requests)
    np.testing.assert_array_equal(again.p_values, judged.p_values)


def test_a_bank_outlives_its_file(profile_directory: Path) -> None:
    reference = Profile.open(profile_directory).reference
    assert reference is not None
    before = [bank.copy() for bank in reference.banks.stamped.values()]
    with (profile_directory / REFERENCE).open("r+b") as file:
        file.truncate(0)
    for bank, old in zip(reference.banks.stamped.values(), before, strict=True):
        np.testing.assert_array_equal(bank, old)
        assert not bank.flags.writeable
        assert bank.flags.aligned


def test_tensors_that_are_too_large_are_not_read(profile_directory: Path) -> None:
    with (profile_directory / TRIGGERS).open("r+b") as file:
        file.truncate(8 * 2**30 + 1)
    assert "is larger than" in refused(profile_directory, TRIGGERS)


def test_writing_what_was_read_changes_nothing(profile_directory: Path, tmp_path: Path) -> None:
    again = tmp_path / "deep" / "again"
    Profile.open(profile_directory).save(again, report="<html></html>")
    assert document(again) == document(profile_directory)
    for file in (TRIGGERS, REFERENCE, AXIS):
        assert (again / file).read_bytes() == (profile_directory / file).read_bytes()


def test_a_profile_that_was_not_calibrated_is_read_and_has_no_screen(profile: Profile, tmp_path: Path) -> None:
    fresh = Profile(replace(profile.document, calibration=None), profile.triggers)
    fresh.save(tmp_path / "fresh")
    read = Profile.open(tmp_path / "fresh")
    assert read.reference is None
    assert not (tmp_path / "fresh" / REFERENCE).exists()
    with pytest.raises(ProfileError, match="run guard calibrate"):
        read.detector()


def test_a_profile_without_triggers_is_read(
    profile: Profile, classifier: Classifier, images: torch.Tensor, tmp_path: Path
) -> None:
    bare = Profile(replace(profile.document, triggers=()), {})
    bare.calibrate(classifier, images, 0.02).save(tmp_path / "clean")
    read = Profile.open(tmp_path / "clean")
    assert read.triggers == {}
    assert read.detector().screen.triggers == ()


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "there is no profile" in refused(tmp_path / "absent", DOCUMENT)


@pytest.mark.parametrize("file", [DOCUMENT, TRIGGERS, REFERENCE, AXIS])
def test_a_missing_file_is_named(profile_directory: Path, file: str) -> None:
    (profile_directory / file).unlink()
    refused(profile_directory, file)


@pytest.mark.parametrize("file", [DOCUMENT, TRIGGERS, REFERENCE, AXIS])
def test_a_directory_in_place_of_a_file_is_named(profile_directory: Path, file: str) -> None:
    (profile_directory / file).unlink()
    (profile_directory / file).mkdir()
    assert "cannot read" in refused(profile_directory, file)


@pytest.mark.parametrize("file", [TRIGGERS, REFERENCE, AXIS])
@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_flipped_byte_is_found(profile_directory: Path, file: str, position: int) -> None:
    data = bytearray((profile_directory / file).read_bytes())
    data[position] ^= 1
    (profile_directory / file).write_bytes(data)
    assert "SHA-256" in refused(profile_directory, file)


@pytest.mark.parametrize("file", [TRIGGERS, REFERENCE])
def test_a_file_that_the_document_does_not_list_is_not_believed(profile_directory: Path, file: str) -> None:
    change_document(profile_directory, lambda changed: changed["files"].pop(file))
    assert "SHA-256" in refused(profile_directory, file)


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_a_truncated_document_is_refused(profile_directory: Path, keep: int) -> None:
    path = profile_directory / DOCUMENT
    path.write_bytes(path.read_bytes()[:keep])
    assert "is damaged" in refused(profile_directory, DOCUMENT)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"[]", b"1", b"{}", b'{"schema": "1"}', b"{} {}"])
def test_a_document_that_is_no_profile_is_refused(profile_directory: Path, data: bytes) -> None:
    (profile_directory / DOCUMENT).write_bytes(data)
    refused(profile_directory, DOCUMENT)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_is_not_finite_is_refused_in_the_document(profile_directory: Path, number: str) -> None:
    def replace_threshold(changed: Any) -> None:
        changed["calibration"]["threshold"]["value"] = "HERE"

    change_document(profile_directory, replace_threshold)
    path = profile_directory / DOCUMENT
    path.write_text(path.read_text(encoding="utf-8").replace('"HERE"', number), encoding="utf-8")
    assert number in refused(profile_directory, DOCUMENT)


def test_a_newer_schema_is_refused_with_what_to_do(profile_directory: Path) -> None:
    change_document(profile_directory, lambda changed: changed.update(schema=SCHEMA + 1, novelty={"unknown": True}))
    message = refused(profile_directory, DOCUMENT)
    assert f"schema {SCHEMA + 1}" in message
    assert "newer guard" in message


@pytest.mark.parametrize("part", PARTS)
def test_a_digest_that_does_not_follow_from_its_parts_is_refused(profile_directory: Path, part: str) -> None:
    change_document(profile_directory, lambda changed: changed["model"]["parts"].update({part: "0" * 64}))
    assert "does not follow" in refused(profile_directory, DOCUMENT)


@pytest.mark.parametrize("target", [-1, 6])
def test_a_target_that_is_no_class_is_refused(profile_directory: Path, target: int) -> None:
    original = document(profile_directory)
    for change in (
        lambda changed: changed["triggers"][0].update(target=target),
        lambda changed: changed["vetting"]["verdict"].update(target=target),
        lambda changed: changed["vetting"]["checks"][0].update(target=target),
    ):
        (profile_directory / DOCUMENT).write_text(json.dumps(original), encoding="utf-8")
        change_document(profile_directory, change)
        assert "target" in refused(profile_directory, DOCUMENT)


def test_two_triggers_with_the_same_id_are_refused(profile_directory: Path) -> None:
    change_document(profile_directory, lambda changed: changed["triggers"].append(dict(changed["triggers"][0])))
    assert "same id" in refused(profile_directory, DOCUMENT)


@pytest.mark.parametrize("k", [0, -1, 10_000])
def test_a_k_that_the_banks_do_not_support_is_refused(profile_directory: Path, k: int) -> None:
    change_document(profile_directory, lambda changed: changed["calibration"].update(k=k))
    assert re.search("k = |do not fit", refused(profile_directory, ""))


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def test_any_value_of_the_document_may_be_anything_without_another_error(profile_directory: Path) -> None:
    original = document(profile_directory)
    for evidence in original["vetting"]["results"]:
        del evidence["classes"][1:]  # one stands for all
    for path in places(original):
        if not path:
            continue
        values: tuple[object, ...] = (None, -1, "x", "\ud800", [], {})
        for value in values:
            changed = copy.deepcopy(original)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            (profile_directory / DOCUMENT).write_text(json.dumps(changed), encoding="utf-8")
            try:
                read = Profile.open(profile_directory)
                if read.document.calibration is not None:
                    read.detector()
            except ProfileError as error:
                assert str(profile_directory) in str(error)  # noqa: PT017 - most changes are refused, not all


@pytest.mark.parametrize("file", [TRIGGERS, REFERENCE, AXIS])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_refused(profile_directory: Path, file: str, value: float) -> None:
    def damage(tensors: Tensors) -> None:
        next(values for values in tensors.values() if values.dtype == np.float32 and values.size).flat[0] = value

    change_tensors(profile_directory, file, damage)
    assert re.search("not finite|must be finite", refused(profile_directory, file))


@pytest.mark.parametrize("file", [TRIGGERS, REFERENCE, AXIS])
@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_a_tensor_of_another_type_is_refused(profile_directory: Path, file: str, dtype: type[np.generic]) -> None:
    def damage(tensors: Tensors) -> None:
        name = next(name for name, values in tensors.items() if values.dtype == np.float32)
        tensors[name] = tensors[name].astype(dtype)

    change_tensors(profile_directory, file, damage)
    assert "is damaged" in refused(profile_directory, file)


def safetensors(dtype: str, shape: list[int], data: bytes) -> bytes:
    header = json.dumps({"mean": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("file", [TRIGGERS, REFERENCE, AXIS])
@pytest.mark.parametrize(
    "data",
    [b"", b"junk", b"\xff" * 64, safetensors("F32", [3], bytes(8)), safetensors("BF16", [2], bytes(4)),
     safetensors("F8_E4M3", [2], bytes(2)), safetensors("NEW", [2], bytes(2))],
)  # fmt: skip
def test_a_file_that_holds_no_float32_tensors_is_refused(profile_directory: Path, file: str, data: bytes) -> None:
    rewrite(profile_directory, file, data)
    assert "is damaged" in refused(profile_directory, file)


@pytest.mark.parametrize("name", ["reference", "stamped.patch-1"])
def test_a_bank_of_another_width_is_refused(profile_directory: Path, name: str) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[name] = np.eye(40, 17, dtype=np.float32)[:17]

    change_tensors(profile_directory, REFERENCE, damage)
    message = refused(profile_directory, REFERENCE)
    assert name in message
    assert "(17, 17)" in message


@pytest.mark.parametrize("name", ["reference", "stamped.patch-1"])
def test_a_bank_that_is_not_normalised_is_refused(profile_directory: Path, name: str) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[name][5] *= 1.01

    change_tensors(profile_directory, REFERENCE, damage)
    assert "must be L2-normalised" in refused(profile_directory, REFERENCE)


def test_a_bank_with_fewer_rows_than_k_is_refused(profile_directory: Path) -> None:
    def damage(tensors: Tensors) -> None:
        for name in ("reference", "stamped.patch-1"):
            tensors[name] = tensors[name][:1]

    change_tensors(profile_directory, REFERENCE, damage)
    assert "1 images in the banks" in refused(profile_directory, REFERENCE)


def test_calibration_scores_that_are_no_list_are_refused(profile_directory: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["values"] = tensors["values"][None]

    change_tensors(profile_directory, REFERENCE, damage)
    assert "values has shape" in refused(profile_directory, REFERENCE)


@pytest.mark.parametrize("name", ["reference", "values", "matrix", "stamped.patch-1"])
def test_a_missing_tensor_of_the_reference_is_refused(profile_directory: Path, name: str) -> None:
    change_tensors(profile_directory, REFERENCE, lambda tensors: tensors.pop(name))
    assert "it has the tensors" in refused(profile_directory, REFERENCE)


def test_an_extra_tensor_of_the_reference_is_refused(profile_directory: Path) -> None:
    change_tensors(profile_directory, REFERENCE, lambda tensors: tensors.update({"stamped.x": tensors["reference"]}))
    assert "stamped.x" in refused(profile_directory, REFERENCE)


@pytest.mark.parametrize(("name", "value"), [("classes", 6), ("classes", -1), ("triggers", 1), ("triggers", -2)])
def test_a_class_or_trigger_that_there_is_not_is_refused(profile_directory: Path, name: str, value: int) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[name][0] = value

    change_tensors(profile_directory, REFERENCE, damage)
    assert f"{name} has an index that is out of range" in refused(profile_directory, REFERENCE)


def test_a_missing_trigger_is_refused(profile_directory: Path) -> None:
    change_tensors(profile_directory, TRIGGERS, lambda tensors: tensors.clear())
    assert "lacks the trigger 'patch-1'" in refused(profile_directory, TRIGGERS)


def test_an_extra_trigger_is_refused(profile_directory: Path) -> None:
    extra = {"patch-2/mask": np.zeros(1, np.float32)}
    change_tensors(profile_directory, TRIGGERS, lambda tensors: tensors.update(extra))
    assert "'patch-2'" in refused(profile_directory, TRIGGERS)


@pytest.mark.parametrize("file", [TRIGGERS, "report.html", DOCUMENT])
def test_a_failed_write_leaves_the_old_profile_and_nothing_else(
    profile: Profile, profile_directory: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    before = contents(profile_directory)

    def filling(real: Callable[..., int]) -> Callable[..., int]:
        def write(path: Path, data: Any, **kwargs: Any) -> int:
            if path.name == file:
                real(path, data[:10], **kwargs)
                raise OSError(28, "No space left on device")
            return real(path, data, **kwargs)

        return write

    for method in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, method, filling(getattr(Path, method)))
    with pytest.raises(OSError, match="No space left"):
        profile.save(profile_directory, report="another")
    monkeypatch.undo()
    assert contents(profile_directory) == before
    assert [path.name for path in profile_directory.parent.iterdir()] == [profile_directory.name]


def test_a_document_that_cannot_be_written_leaves_the_old_profile(profile: Profile, profile_directory: Path) -> None:
    before = contents(profile_directory)
    calibration = profile.document.calibration
    assert calibration is not None
    broken = replace(calibration, threshold=replace(calibration.threshold, value=float("nan")))
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(profile, document=replace(profile.document, calibration=broken)).save(profile_directory)
    assert contents(profile_directory) == before


def test_a_profile_takes_the_place_of_an_older_one_as_a_whole(profile: Profile, profile_directory: Path) -> None:
    fresh = Profile(replace(profile.document, calibration=None), profile.triggers)
    fresh.save(profile_directory, report="new")
    assert set(contents(profile_directory)) == {DOCUMENT, TRIGGERS, "report.html"}
    assert [path.name for path in profile_directory.parent.iterdir()] == [profile_directory.name]
    assert Profile.open(profile_directory).document.calibration is None


def test_a_foreign_directory_is_not_replaced(profile: Profile, tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UsageError, match=r"photos exists and has no profile\.json"):
        profile.save(foreign)
    assert contents(foreign) == {"mine.txt": b"precious"}
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_foreign_file_is_not_replaced(profile: Profile, tmp_path: Path) -> None:
    foreign = tmp_path / "notes"
    foreign.write_text("precious", encoding="utf-8")
    with pytest.raises(UsageError, match="choose another place"):
        profile.save(foreign)
    assert foreign.read_text(encoding="utf-8") == "precious"


def test_an_empty_directory_is_filled(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    profile.save(tmp_path / "empty")
    assert Profile.open(tmp_path / "empty").reference is not None


def test_a_profile_is_accepted_for_its_model(profile: Profile) -> None:
    profile.check_model(ClassifierDigest(profile.document.model.parts))


@pytest.mark.parametrize("changed", [("weights",), ("architecture", "tokenizer"), PARTS])
def test_a_profile_of_another_model_is_refused_by_what_differs(profile: Profile, changed: tuple[str, ...]) -> None:
    other = ClassifierDigest({**profile.document.model.parts, **dict.fromkeys(changed, "0" * 64)})
    with pytest.raises(ProfileError, match=f": {', '.join(changed)} differ"):
        profile.check_model(other)


def test_a_profile_of_release_0_1_is_read_under_todays_names(profile: Profile, profile_directory: Path) -> None:
    def older(document: dict[str, Any]) -> None:
        vetting = document["vetting"]
        document["schema"] = 3
        vetting["evidence"] = vetting.pop("results")
        for item in vetting["evidence"]:
            del item["reference_model"]
            item["control"] = "self"
        for check in vetting["checks"]:
            check["control"] = check.pop("reference_model")
            check["control_success"] = check.pop("reference_success")
        vetting["control"] = vetting.pop("reference_model")
        vetting["effort"]["self_control"] = vetting["effort"].pop("derived_reference")

    change_document(profile_directory, older)
    read = Profile.open(profile_directory).document
    assert read.schema == SCHEMA
    assert {item.reference_model for item in read.vetting.results} == {"derived"}
    assert read.vetting.checks == profile.document.vetting.checks
    assert read.vetting.reference_model == profile.document.vetting.reference_model
    assert read.vetting.effort == profile.document.vetting.effort


def axis(target: int = 1, seed: int = 0) -> Axis:
    offset = np.random.default_rng(seed).normal(size=16).astype(np.float32)
    return Axis("axis-1", offset / np.linalg.norm(offset), target, 900, 400, 0.02, 0.001, 0.9)


def test_an_adopted_axis_is_a_score_of_the_profile_and_outlives_calibrations(
    profile: Profile, classifier: Classifier, images: torch.Tensor, tmp_path: Path
) -> None:
    adopted = profile.adopt([axis(), replace(axis(), name="axis-2"), axis(seed=1)])
    assert [record.name for record in adopted.document.axes] == ["axis-1", "axis-2"]
    adopted.save(tmp_path / "adopted")
    read = Profile.open(tmp_path / "adopted")
    assert read.document.axes == adopted.document.axes
    anew = read.calibrate(classifier, images, 0.02)
    for each in (adopted, read, anew):
        assert each.document.calibration is not None
        detector = each.detector()
        assert detector.triggers == ("patch-1", "axis-1", "axis-2")
        assert detector.threshold == each.document.calibration.threshold
    requests = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    judged, again = adopted.detector().score(requests), read.detector().score(requests)
    np.testing.assert_array_equal(again.p_values, judged.p_values)
    assert {"axis-1", "axis-2"} < set(judged.scores.parts)


def test_a_profile_that_knows_no_axes_adopts_none(profile: Profile) -> None:
    assert profile.reference is not None
    for each in (replace(profile, reference=None), replace(profile, reference=replace(profile.reference, axis=None))):
        with pytest.raises(ProfileError, match="calibrate it with images once"):
            each.adopt([axis()])


def test_a_profile_of_an_older_guard_has_no_axis(profile: Profile, tmp_path: Path) -> None:
    assert profile.reference is not None
    replace(profile, reference=replace(profile.reference, axis=None)).save(tmp_path / "older")
    read = Profile.open(tmp_path / "older")
    assert read.reference is not None
    assert read.reference.axis is None
    assert read.detector().triggers == ("patch-1",)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors: tensors.pop("clean"), "it has the tensors"),
        (lambda tensors: tensors.update(clean=tensors["clean"][1:]), "clean has shape"),
        (lambda tensors: tensors.update(matrix=tensors["matrix"] * np.inf), "matrix has a value that is not finite"),
        (lambda tensors: tensors["bank_classes"].fill(99), "bank_classes has an index that is out of range"),
        (lambda tensors: tensors["offsets"].fill(0), "an axis has no direction"),
    ],
)
def test_a_damaged_file_of_axes_is_refused(
    damage: Callable[[Tensors], object], said: str, profile: Profile, tmp_path: Path
) -> None:
    profile.adopt([axis()]).save(tmp_path / "profile")
    with np.errstate(invalid="ignore"):
        change_tensors(tmp_path / "profile", AXIS, damage)
    assert said in refused(tmp_path / "profile", AXIS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document["files"].pop(AXIS), "it names axes"),
        (lambda document: document["axes"][0].update(target=99), "the target of an axis"),
        (lambda document: document["axes"][0].update(name="patch-1"), "two axes have the same name"),
    ],
)
def test_axes_that_contradict_the_rest_are_refused(
    change: Callable[[Any], object], said: str, profile: Profile, tmp_path: Path
) -> None:
    profile.adopt([axis()]).save(tmp_path / "profile")
    change_document(tmp_path / "profile", change)
    assert said in refused(tmp_path / "profile", DOCUMENT)
