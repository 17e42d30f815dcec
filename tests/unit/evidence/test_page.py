import io
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from PIL import Image

from guard.errors import UsageError
from guard.evidence import Record, record_page, thumbnail
from guard.profiles import Profile

Make = Callable[..., Record]


class Reader(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_reads_the_numbers_out(record: Make) -> None:
    page = record_page(
        record(
            p_value=1 / 2001,
            alpha=0.001,
            predicted="dog",
            trigger="patch-1",
            target="dog",
            second_look="confirmed",
            explanation="with it undone the answer changes",
        )
    )
    text = Reader(page).text
    assert "Flagged: a clean request looks like this at most once in 2,001." in text
    assert "one clean request in about 1,000 is flagged" in text
    assert "it matches patch-1, which leads to “dog”; the model answered “dog”" in text
    assert "Second look: confirmed: with it undone the answer changes." in text


def test_all_text_is_escaped(record: Make) -> None:
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    names = ("trace_id", "predicted", "trigger", "target", "second_look", "explanation", "input_digest", "decision")
    page = Reader(
        record_page(
            record(attack, scores={attack: 1.0}, **dict.fromkeys((*names, "model", "mode", "model_digest"), attack))
        )
    )
    assert page.text.count(attack) >= len(names) + 4
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_may_load_and_run_nothing(record: Make) -> None:
    page = record_page(record(thumbnail=thumbnail(Image.new("RGB", (8, 8)))))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert policy in [value for _, value in Reader(page).attributes]
    assert not re.findall(r"(?:src|href)=\"(?!data:image/)", page)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_thumbnail_is_shown(record: Make, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    assert f'src="data:image/{kind.lower()};base64,' in record_page(record(thumbnail=buffer.getvalue()))


@pytest.mark.parametrize("data", [None, b"", b"<svg onload='alert(1)'/>"])
def test_what_is_no_thumbnail_is_not_shown(record: Make, data: bytes | None) -> None:
    page = record_page(record(thumbnail=data))
    assert "No thumbnail was kept" in page
    assert "img" not in Reader(page).tags


@pytest.mark.parametrize("p_value", [0.0, -1.0, 5e-324, 1e300])
def test_numbers_out_of_range_make_a_page_too(record: Make, p_value: float) -> None:
    assert "<h1>" in record_page(record(p_value=p_value, alpha=p_value, scores={"a": float("inf")}))


def test_a_score_is_drawn_against_its_threshold(record: Make) -> None:
    scores = {"match": 3.0, "k-distance": -1.0, "LID": 7.0}
    page = record_page(record(scores=scores, thresholds={"match": 2.0, "k-distance": 1.0}))
    assert 'class="bar above" style="left: 0.0%; width: 100.0%"' in page
    assert 'class="bar" style="left: 0.0%; width: 50.0%"' in page
    assert re.findall(r'class="mark" style="left: ([\d.]+)%', page) == ["66.7", "100.0"]
    assert "<td>LID</td><td>7</td>" in page


def test_a_profile_adds_a_picture_of_the_trigger(record: Make, profile: Profile) -> None:
    page = record_page(record(model_digest=profile.document.model.digest, trigger="patch-1"), profile)
    assert "Family patch, leads to “dog”" in page
    assert page.count("<img src=") == 4


def test_a_trigger_that_the_profile_no_longer_has_is_left_out(record: Make, profile: Profile) -> None:
    page = record_page(record(model_digest=profile.document.model.digest, trigger="patch-9"), profile)
    assert "img" not in Reader(page).tags


def test_a_profile_of_another_model_is_refused(record: Make, profile: Profile) -> None:
    with pytest.raises(UsageError, match="the profile is of another model than the record"):
        record_page(record(), profile)


def test_a_page_without_a_profile_needs_no_torch() -> None:
    code = (
        "import sys, guard.evidence as e\n"
        "lazy = {'jinja2', 'pyarrow', 'torch', 'matplotlib', 'guard.sidecar'}\n"
        "assert not lazy & set(sys.modules)\n"
        "e.record_page(e.Record('r', 'm', '', 0, 'flag', 'tag'))\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
