from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from guard import profiles
from guard.classifiers import Classifier
from guard.errors import ProfileError
from guard.profiles import Profile
from guard.profiles.profile import Array
from guard.triggers import FAMILIES
from tests.conftest import SIZE


def test_near_duplicates_stay_on_one_side_of_the_split(
    profile: Profile, classifier: Classifier, images: torch.Tensor
) -> None:
    """Four copies of each image: a copy in the bank is at distance 0, which no new request will be."""
    copies = images[:60].repeat(4, 1, 1, 1)
    bare = replace(profile, document=replace(profile.document, triggers=()), triggers={})
    apart, together = (
        profiles.calibrate(bare, classifier, copies, 0.05, k=1, groups=groups).reference
        for groups in (None, torch.arange(60).repeat(4))
    )
    assert apart
    assert together
    assert apart.clean.parts["k-distance"].min() < 1e-3 < together.clean.parts["k-distance"].min()
    banks = together.banks.reference.round(5).tolist()
    assert len(banks) == len(apart.banks.reference) == 96 == 4 * len({tuple(row) for row in banks})


def test_without_groups_each_image_is_one(profile: Profile, classifier: Classifier, images: torch.Tensor) -> None:
    plain, grouped = (
        profiles.calibrate(profile, classifier, images, 0.05, groups=groups).document.calibration
        for groups in (None, torch.arange(len(images)))
    )
    assert plain == grouped


def with_triggers(profile: Profile, triggers: dict[str, dict[str, Array]]) -> Profile:
    """A profile, not calibrated, with other triggers: family → tensors."""
    known = profile.document.triggers[0]
    records = tuple(replace(known, id=f"{family}-1", family=family) for family in triggers)
    named = {f"{family}-1": tensors for family, tensors in triggers.items()}
    return Profile(replace(profile.document, triggers=records, calibration=None), named)


def test_triggers_of_every_family_come_back_from_disk(profile: Profile, images: torch.Tensor, tmp_path: Path) -> None:
    shape, generator = (3, SIZE, SIZE), torch.Generator().manual_seed(0)
    found = {name: family.constrain(family.start(1, shape, generator))[0] for name, family in FAMILIES.items()}
    tensors = {name: {key: t.numpy() for key, t in trigger.tensors().items()} for name, trigger in found.items()}
    profiles.write(with_triggers(profile, tensors), tmp_path / "profile", report="")
    read = profiles.load_triggers(profiles.read(tmp_path / "profile"))
    for name, trigger in found.items():
        assert torch.equal(read[f"{name}-1"].stamp(images[:4]), trigger.stamp(images[:4]))


@pytest.mark.parametrize(
    ("family", "tensors", "reason"),
    [
        ("curse", {"mask": (1, 8, 8)}, "of the family 'curse', which this guard does not know"),
        ("warp", {"field": (2, 8, 9)}, r"'warp-1' is no warp: field has shape \[2, 8, 9\], not \[2, k, k\]"),
        ("blend", {"alpha": (1, 1, 1)}, "'blend-1' is no blend: it has the tensors 'alpha', not 'alpha', 'pattern'"),
    ],
)
def test_tensors_that_make_no_trigger_are_refused(
    profile: Profile, family: str, tensors: dict[str, tuple[int, ...]], reason: str
) -> None:
    hostile = with_triggers(profile, {family: {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}})
    with pytest.raises(ProfileError, match=reason):
        profiles.load_triggers(hostile)
