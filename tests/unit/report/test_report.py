import re
from html.parser import HTMLParser

import numpy as np
import torch

from guard import report
from guard.profiles import Profile
from guard.triggers import Additive, Patch
from tests.conftest import SIZE


def render(profile: Profile, images: torch.Tensor) -> str:
    return report.render(profile, report.examples(profile, images))


def test_it_is_one_file_that_loads_nothing(profile: Profile, images: torch.Tensor) -> None:
    text = render(profile, images)

    class Sources(HTMLParser):
        found: list[str] = []  # noqa: RUF012 - a test's scratch

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in {"src", "href"} and tag != "use"]
            assert tag not in {"script", "link", "iframe"}

    Sources().feed(text)
    assert Sources.found
    assert all(source.startswith("data:image/png;base64,") for source in Sources.found)


def test_it_says_verdict_class_trigger_and_numbers(profile: Profile, images: torch.Tensor) -> None:
    text = re.sub(r"\s+", " ", render(profile, images))
    for expected in ("<strong>backdoored</strong>", "target class “dog”", "patch-1", profile.document.model.digest):
        assert expected in text
    assert "false-alarm rate of 0.02" in text
    assert text.count("<svg") == 2  # one family, one histogram


def test_what_a_model_says_of_itself_is_escaped(profile: Profile, images: torch.Tensor) -> None:
    from dataclasses import replace

    model = replace(profile.document.model, source="<script>alert(1)</script>")
    hostile = Profile(replace(profile.document, model=model), profile.triggers, profile.reference)
    assert "<script>" not in render(hostile, images)


def test_equal_profiles_give_equal_reports(profile: Profile, images: torch.Tensor) -> None:
    assert render(profile, images) == render(profile, images)


def test_an_example_shows_where_the_trigger_acts(images: torch.Tensor) -> None:
    patch = report.example(Patch.badnets(SIZE, 4, seed=0), images)
    assert (patch.mask > 0).sum() == 16
    changed = (patch.clean != patch.stamped).any(1)
    assert not changed[:, patch.mask == 0].any()
    delta = torch.zeros(3, SIZE, SIZE)
    delta[:, 3, 5] = 0.2
    additive = report.example(Additive(delta), images)
    assert np.argwhere(additive.mask == 255).tolist() == [[3, 5]]
