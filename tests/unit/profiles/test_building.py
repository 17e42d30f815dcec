from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from guard import profiles
from guard._types import Floats
from guard.classifiers import Classifier
from guard.errors import EmbeddingsError, ProfileError, UsageError
from guard.profiles import Profile
from guard.triggers import FAMILIES, Patch
from tests.conftest import SIZE


def test_near_duplicates_stay_on_one_side_of_the_split(
    profile: Profile, classifier: Classifier, images: torch.Tensor
) -> None:
    """Four copies of each image: a copy in the bank is at distance 0, which no new request will be."""
    copies = images[:60].repeat(4, 1, 1, 1)
    bare = replace(profile, document=replace(profile.document, triggers=()), triggers={})
    apart, together = (
        bare.calibrate(classifier, copies, 0.05, k=1, groups=groups).reference
        for groups in (None, np.tile(np.arange(60), 4))
    )
    assert apart
    assert together
    assert apart.clean.parts["k-distance"].min() < 1e-3 < together.clean.parts["k-distance"].min()
    banks = together.banks.reference.round(5).tolist()
    assert len(banks) == len(apart.banks.reference) == 96 == 4 * len({tuple(row) for row in banks})


def test_without_groups_each_image_is_one(profile: Profile, classifier: Classifier, images: torch.Tensor) -> None:
    plain, grouped = (
        profile.calibrate(classifier, images, 0.05, groups=groups).document.calibration
        for groups in (None, np.arange(len(images)))
    )
    assert plain == grouped


def test_images_that_carry_a_trigger_are_left_out_and_named(
    profile: Profile, classifier: Classifier, images: torch.Tensor, trigger: Patch
) -> None:
    # The untrained model sends stamped images to a class of its own choice.
    target = int(classifier.predict(classifier.embed(trigger.stamp(images))).mode().values)
    records = tuple(replace(record, target=target) for record in profile.document.triggers)
    profile = replace(profile, document=replace(profile.document, triggers=records))
    poisoned, rows = images.clone(), [3, 77, 150, 303, 444]
    poisoned[rows] = trigger.stamp(images[rows])
    names = [f"{place:04}.png" for place in range(len(images))]
    calibrated = [profile.calibrate(classifier, part, 0.05, names=names) for part in (images, poisoned)]
    clean, other = (each.document.calibration for each in calibrated)
    assert clean
    assert other
    # Those that were to set the threshold count in it, also in a profile that is opened later.
    dropped = calibrated[1].document.left_out()
    assert dropped.tolist() == [target] * sum(item.part == "calibration" for item in other.left_out)
    assert len(dropped) >= 1
    assert calibrated[1].detector().threshold == other.threshold
    found = {item.image: item for item in other.left_out}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).argsort()
    kept_out = {names[row] for row in rows if order[row] >= len(images) - other.held_out}
    assert {names[row] for row in rows} - kept_out <= set(found)
    assert {found[names[row]].trigger for row in rows if names[row] in found} == {"patch-1"}
    assert len(found) - (len(rows) - len(kept_out)) <= len(clean.left_out) + 2
    assert other.reference + sum(item.part == "bank" for item in other.left_out) == round(0.4 * len(images))
    assert other.threshold.size + sum(item.part == "calibration" for item in other.left_out) == round(0.4 * len(images))


def test_embeddings_alone_replace_the_threshold_and_need_banks(
    profile: Profile, classifier: Classifier, images: torch.Tensor
) -> None:
    embeddings = classifier.embed(images).numpy()
    again = profile.recalibrate(embeddings, 0.01, per_class=True)
    assert again.reference
    assert profile.reference
    assert again.reference.banks is profile.reference.banks
    record = again.document.calibration
    assert record
    assert (record.threshold.alpha, record.per_class) == (0.01, True)
    assert record.threshold.size + record.held_out + len(record.left_out) == len(images)
    bare = Profile(replace(profile.document, calibration=None), profile.triggers)
    with pytest.raises(ProfileError, match="calibrate it with images once"):
        bare.recalibrate(embeddings, 0.01)
    with pytest.raises(UsageError, match="at least 999"):
        profile.recalibrate(embeddings, 0.001)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read"),
        (b"\x80\x04 a pickle", "not a NumPy file"),
        (np.zeros((3, 15), np.float32), r"floats of shape \[N, 16\]"),
        (np.zeros((3, 16), np.int64), "floats of shape"),
        (np.full((3, 16), np.nan, np.float32), "not finite"),
        (np.array([{}, {}]), "not a NumPy file"),
    ],
)
def test_a_file_that_holds_no_embeddings_is_refused(content: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "embeddings.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, np.asarray(content))
    with pytest.raises(EmbeddingsError, match=reason):
        profiles.read_embeddings(path, 16)


def with_triggers(profile: Profile, triggers: dict[str, dict[str, Floats]]) -> Profile:
    """A profile, not calibrated, with other triggers: family → tensors."""
    known = profile.document.triggers[0]
    records = tuple(replace(known, id=f"{family}-1", family=family) for family in triggers)
    named = {f"{family}-1": tensors for family, tensors in triggers.items()}
    return Profile(replace(profile.document, triggers=records, calibration=None), named)


def test_triggers_of_every_family_come_back_from_disk(profile: Profile, images: torch.Tensor, tmp_path: Path) -> None:
    shape, generator = (3, SIZE, SIZE), torch.Generator().manual_seed(0)
    found = {name: family.constrain(family.start(1, shape, generator))[0] for name, family in FAMILIES.items()}
    tensors = {name: {key: t.numpy() for key, t in trigger.tensors().items()} for name, trigger in found.items()}
    with_triggers(profile, tensors).save(tmp_path / "profile")
    read = Profile.open(tmp_path / "profile").load_triggers()
    for name, trigger in found.items():
        assert torch.equal(read[f"{name}-1"].stamp(images[:4]), trigger.stamp(images[:4]))


@pytest.mark.parametrize(
    ("family", "tensors", "reason"),
    [
        ("curse", {"mask": (1, 8, 8)}, "of the family 'curse', which this guard does not know"),
        ("warp", {"field": (2, 8, 9)}, r"'warp-1' is not a warp trigger: field has shape \[2, 8, 9\], not \[2, k, k\]"),
        (
            "blend",
            {"alpha": (1, 1, 1)},
            "'blend-1' is not a blend trigger: it has the tensors 'alpha', not 'alpha', 'patt",
        ),
    ],
)
def test_tensors_that_make_no_trigger_are_refused(
    profile: Profile, family: str, tensors: dict[str, tuple[int, ...]], reason: str
) -> None:
    hostile = with_triggers(profile, {family: {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}})
    with pytest.raises(ProfileError, match=reason):
        hostile.load_triggers()


def test_a_file_with_tensors_that_make_no_trigger_is_refused_and_an_unknown_family_is_handed_on(
    profile: Profile, tmp_path: Path
) -> None:
    field = np.zeros((2, 8, 9), np.float32)
    with_triggers(profile, {"warp": {"field": field}}).save(tmp_path / "damaged")
    with pytest.raises(ProfileError, match=r"'warp-1' is not a warp trigger: field has shape"):
        Profile.open(tmp_path / "damaged")
    with_triggers(profile, {"curse": {"field": field}}).save(tmp_path / "newer")
    assert Profile.open(tmp_path / "newer").triggers.keys() == {"curse-1"}


def test_a_profile_that_is_saved_without_a_report_leaves_no_older_one(profile: Profile, tmp_path: Path) -> None:
    profile.save(str(tmp_path / "profile"), report="<html></html>")
    assert (tmp_path / "profile" / profiles.REPORT_FILE).is_file()
    profile.save(tmp_path / "profile")
    assert not (tmp_path / "profile" / profiles.REPORT_FILE).exists()
    assert Profile.open(str(tmp_path / "profile")).document.model == profile.document.model
