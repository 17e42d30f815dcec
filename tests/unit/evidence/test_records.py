import io
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from PIL import Image

from guard.errors import UsageError
from guard.evidence import Record, RecordFilter, thumbnail
from guard.evidence.records import MAX_SCORES, MAX_TEXT, MAX_THUMBNAIL

Make = Callable[..., Record]


def test_texts_of_clients_are_bounded_and_printable(record: Make) -> None:
    made = record("a\x1b[2Jb\r\nc\u202ed\ud800" + "e" * 1000, trace_id="\x00")
    assert made.request_id.startswith("a\ufffd[2Jb\ufffd\ufffdc\ufffdd\ufffde")
    assert (len(made.request_id), made.request_id[-1], made.trace_id) == (MAX_TEXT, "…", "\ufffd")


def test_scores_and_thumbnails_are_bounded(record: Make) -> None:
    made = record(scores={str(k): k for k in range(1000)}, thumbnail=b"x" * (MAX_THUMBNAIL + 1))
    assert (len(made.scores), made.thumbnail) == (MAX_SCORES, None)


def test_times_are_kept_in_utc_with_milliseconds(record: Make) -> None:
    assert record(time="2026-05-09T14:00:00.123456+02:00").time == "2026-05-09T12:00:00.123Z"
    for wrong in ("yesterday", "0001-01-01T00:00:00+14:00"):
        with pytest.raises(ValueError, match=r"yesterday|0001"):
            record(time=wrong)


def test_a_p_value_that_is_not_finite_is_none(record: Make) -> None:
    assert (record(p_value=math.nan).p_value, record(p_value=0.25).p_value) == (None, 0.25)


@pytest.mark.parametrize(("text", "ago"), [("90s", 90), ("15m", 900), ("1h", 3600), ("2d", 172_800), ("1w", 604_800)])
def test_a_filter_takes_how_long_ago(text: str, ago: int) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    since = RecordFilter(since=text).since
    assert since is not None
    assert before <= datetime.fromisoformat(since) + timedelta(seconds=ago) <= datetime.now(UTC)


def test_a_filter_takes_rfc_3339_and_a_date() -> None:
    assert RecordFilter(since="2026-05-09", until="2026-05-09T12:00:00-01:00") == RecordFilter(
        since="2026-05-09T00:00:00.000Z", until="2026-05-09T13:00:00.000Z"
    )


@pytest.mark.parametrize("text", ["soon", "-1h", "1y", "999999999w", "", "2026-13-01", "\x1b"])
def test_a_filter_says_what_a_time_looks_like(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time; give one such as") as caught:
        RecordFilter(until=text)
    assert "\x1b" not in str(caught.value)


def test_a_thumbnail_is_small_and_of_the_same_shape() -> None:
    noise = Image.effect_noise((640, 320), 90)
    data = thumbnail(noise)
    assert len(data) < MAX_THUMBNAIL
    assert Image.open(io.BytesIO(data)).size == (128, 64)
    assert noise.size == (640, 320)
