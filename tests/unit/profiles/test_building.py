from dataclasses import replace

import torch

from guard import profiles
from guard.classifiers import Classifier
from guard.profiles import Profile


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
    assert apart.scores.min() < 1e-3 < together.scores.min()
    assert len(together.clean) == len(apart.clean) == 96
    assert len(together.clean.round(5).tolist()) == 4 * len({tuple(row) for row in together.clean.round(5).tolist()})


def test_without_groups_each_image_is_one(profile: Profile, classifier: Classifier, images: torch.Tensor) -> None:
    plain, grouped = (
        profiles.calibrate(profile, classifier, images, 0.05, groups=groups).document.calibration
        for groups in (None, torch.arange(len(images)))
    )
    assert plain == grouped
