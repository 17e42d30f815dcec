import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta

from guard.errors import StateError, UsageError
from guard.screening import monitor as module
from guard.screening.monitor import Alarm, Kind, Monitor, WatchedScore

Floats = NDArray[np.float64]

MATCH, DENSITY = WatchedScore("patch-0", "attack", 2000), WatchedScore("density", "drift", 2000)


def feed(monitor: Monitor, match: Floats, density: Floats | None = None) -> list[Alarm]:
    densities = [None] * len(match) if density is None else density.tolist()
    return [
        alarm
        for attack, drift in zip(match.tolist(), densities, strict=True)
        for alarm in monitor.observe({"patch-0": attack, "density": drift})
    ]


def attacked(generator: np.random.Generator, count: int, share: float) -> Floats:
    """p-values of the match, where a share of the images is triggered."""
    values: Floats = np.where(generator.random(count) < share, 1e-4, 1) * generator.random(count)
    return values


@pytest.mark.parametrize("size", [1, 9, 20, 333, 2000, 50_000])
@pytest.mark.parametrize("level", [0.001, 0.05, 0.5, 0.95])
def test_the_bound_on_the_clean_rate_is_the_quantile_of_its_distribution(size: int, level: float) -> None:
    rank = max(1, math.floor(level * (size + 1)))
    for delta in (0.9, 0.1, 1e-3, 1e-8):
        assert module.upper_rate(size, rank, delta) == pytest.approx(beta.isf(delta, rank, size + 1 - rank), rel=1e-9)


def worst_clean(monitor: Monitor, generator: np.random.Generator) -> Iterator[Mapping[str, float]]:
    """Images of a calibration so unlucky that every level of every stream has the largest rate it can have."""
    detectors = monitor._detectors
    while True:
        draws = generator.random(len(detectors))
        yield {
            name: next(
                (level for level, bound in zip(each.levels, each.bounds, strict=True) if draw < bound),
                1.0,
            )
            for (name, each), draw in zip(detectors.items(), draws, strict=True)
        }


def test_the_run_length_holds_for_the_most_unlucky_calibration() -> None:
    generator = np.random.default_rng(0)
    streams = [WatchedScore(name, "attack", 300) for name in "abcdef"] + [WatchedScore("density", "drift", 100)]
    lengths = []
    for _ in range(40):
        monitor = Monitor(streams, run_length=300)
        images = worst_clean(monitor, generator)
        lengths.append(next(count for count, image in enumerate(images, 1) if monitor.observe(image)))
    # The length is nearly exponential, so that its mean over 40 has a spread of 16 %: two of them.
    assert float(np.mean(lengths)) * 1.32 >= 300
    # … and a monitor that never alarms would pass the line above.
    assert float(np.mean(lengths)) <= 10 * 300


def test_the_error_of_an_unlucky_calibration_is_no_alarm() -> None:
    generator = np.random.default_rng(1)
    calibrations = np.sort(generator.random((300, 2000)), axis=1)
    # The largest share of clean scores above the 20th largest of 2,000, which is the level 0.01.
    unlucky = calibrations[calibrations[:, -20].argmin()]
    count = 100_000
    above = len(unlucky) - np.searchsorted(unlucky, generator.random(count), side="left")
    p_values = (1 + above) / (len(unlucky) + 1)
    # Against the nominal rate any valid test would have rejected long ago: ten spreads.
    rate = float((p_values <= 0.01).mean())
    assert (rate - 0.01) / math.sqrt(0.01 * 0.99 / count) > 10
    assert feed(Monitor([MATCH, DENSITY]), p_values, p_values) == []


@pytest.mark.parametrize(("share", "within"), [(0.01, 40_000), (0.05, 1500), (0.5, 50)])
def test_an_attack_is_found_and_dated(share: float, within: int) -> None:
    generator = np.random.default_rng(2)
    monitor = Monitor([MATCH, DENSITY])
    assert feed(monitor, generator.random(10_000), generator.random(10_000)) == []
    (alarm,) = feed(monitor, attacked(generator, within, share), generator.random(within))
    since = alarm.observed - 10_000
    assert (alarm.stream, alarm.kind, alarm.during_drift) == ("patch-0", "attack", False)
    assert 0 < since <= within
    assert since / 3 <= alarm.after <= 3 * since
    assert share / 2 <= alarm.rate - alarm.level <= 2 * share
    assert alarm.level < alarm.bound < alarm.rate
    assert monitor.active == (alarm,)


def test_drift_is_no_attack() -> None:
    generator = np.random.default_rng(3)
    monitor = Monitor([MATCH, DENSITY])
    (alarm,) = feed(monitor, generator.random(3000), generator.beta(0.5, 1, 3000))
    assert (alarm.stream, alarm.kind) == ("density", "drift")
    assert alarm.observed < 600
    assert alarm.during_drift is False


def test_a_burst_of_triggered_requests_is_no_drift() -> None:
    generator = np.random.default_rng(4)
    triggered = generator.random(3000) < 0.5
    small = 0.04 * generator.random(3000)
    match = np.where(triggered, small, generator.random(3000))
    density = np.where(triggered, small, generator.random(3000))
    (alarm,) = feed(Monitor([MATCH, DENSITY]), match, density)
    assert (alarm.stream, alarm.kind) == ("patch-0", "attack")
    # Without the match nothing tells the two apart.
    monitor = Monitor([DENSITY])
    assert any(monitor.observe({"density": value}) for value in density.tolist())


def test_drift_that_moves_the_match_is_named_beside_the_attack() -> None:
    generator = np.random.default_rng(5)
    monitor = Monitor([MATCH, DENSITY])
    feed(monitor, generator.beta(0.6, 1, 5000), generator.beta(0.3, 1, 5000))
    assert [(alarm.kind, alarm.during_drift) for alarm in monitor.active] == [("attack", True), ("drift", False)]


def test_an_alarm_is_raised_once_stays_up_while_the_attack_lasts_and_ends_after_it() -> None:
    generator = np.random.default_rng(6)
    monitor = Monitor([MATCH])
    raised = [monitor.observe({"patch-0": value}) for value in attacked(generator, 20_000, 0.05)]
    (alarm,) = (alarm for alarms in raised for alarm in alarms)
    assert monitor.active == (alarm,)
    quiet = max(1000, 4 * alarm.after)
    for _ in range(quiet):
        monitor.observe({"patch-0": 1.0})
    assert not monitor.active
    assert any(monitor.observe({"patch-0": 0.0}) for _ in range(50))  # a new attack is a new alarm


def test_a_stream_that_did_not_see_an_image_stays_as_it_is() -> None:
    monitor = Monitor([MATCH, DENSITY])
    monitor.observe({"patch-0": 0.5, "density": 0.5})
    before = monitor.state()["streams"]
    monitor.observe({"patch-0": 0.2, "density": None})
    monitor.observe({"patch-0": 0.2})
    after = monitor.state()["streams"]
    assert after["density"] == before["density"]
    assert (before["patch-0"]["observed"], after["patch-0"]["observed"]) == (1, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("size", "rank", "level"), [(999, 1, 1e-3), (999, 2, 3e-3), (6999, 70, 1e-2)])
def test_a_p_value_on_a_level_counts_however_it_was_rounded(
    dtype: type[np.floating], size: int, rank: int, level: float
) -> None:
    monitor = Monitor([WatchedScore("patch-0", "attack", size)])
    p_value = float(dtype(rank / (size + 1)))
    (alarm,) = next(alarms for alarms in (monitor.observe({"patch-0": p_value}) for _ in range(99)) if alarms)
    assert alarm.level == pytest.approx(level)
    assert alarm.rate == 1


@pytest.mark.parametrize("moment", [0, 700, 5000])
def test_a_restart_changes_nothing(tmp_path: Path, moment: int) -> None:
    generator = np.random.default_rng(7)
    match, density = attacked(generator, 6000, 0.03), generator.random(6000)
    whole, first, second = (Monitor([MATCH, DENSITY]) for _ in range(3))
    expected = feed(whole, match, density)
    raised = feed(first, match[:moment], density[:moment])
    first.save(tmp_path / "kept" / "monitor.json")
    second.load(tmp_path / "kept" / "monitor.json")
    assert second.active == first.active
    raised += feed(second, match[moment:], density[moment:])
    assert raised == expected
    assert len(raised) == 1
    assert second.state() == whole.state()


def test_a_state_of_other_streams_or_settings_is_refused(tmp_path: Path) -> None:
    Monitor([MATCH, DENSITY]).save(tmp_path / "monitor.json")
    for other in (
        Monitor([MATCH]),
        Monitor([WatchedScore("patch-0", "attack", 2001), DENSITY]),
        Monitor([MATCH, DENSITY], run_length=1e6),
        Monitor([MATCH, DENSITY], delta=1e-2),
    ):
        with pytest.raises(StateError, match=r"monitor.json was saved for other streams or settings"):
            other.load(tmp_path / "monitor.json")


def damaged() -> Iterator[Any]:
    monitor = Monitor([MATCH, DENSITY])
    feed(monitor, np.full(50, 1e-4), np.full(50, 0.5))
    changes: list[tuple[tuple[str | int, ...], Any]] = [
        (("streams",), []),
        (("streams", "density"), None),
        (("streams", "patch-0"), {}),
        (("streams", "patch-0", "observed"), -1),
        (("streams", "patch-0", "observed"), 50.0),
        (("streams", "patch-0", "observed"), 10**30),
        (("streams", "patch-0", "sums"), [[1.0], [1.0, 2.0]]),
        (("streams", "patch-0", "sums"), "many"),
        (("streams", "density", "sums", 0), [[1.0]]),
        (("streams", "density", "sums", 0, 0, 0), math.nan),
        (("streams", "density", "sums", 0, 0, 0), math.inf),
        (("streams", "density", "sums", 0, 0, 0), -1.0),
        (("streams", "density", "sums", 0, 0, 0), 1e300),
        (("streams", "density", "sums", 1, 0, 0), 1e300),
        (("streams", "density", "sums", 2, 0, 0), 1e300),
        (("streams", "patch-0", "alarm"), 3),
        (("streams", "patch-0", "alarm"), [1, 1, 0, 0.5]),
        (("streams", "patch-0", "alarm"), [8, 8, 99, 0.5, 50]),
        (("streams", "patch-0", "alarm"), [8, 8, 0, math.nan, 50]),
        (("streams", "patch-0", "alarm"), [8, 8, 0, 0.5, 51]),
        (("streams", "patch-0", "alarm"), [8, 51, 0, 0.5, 50]),
        (("streams", "patch-0", "alarm"), [0, 8, 0, 0.5, 50]),
        (("streams", "patch-0", "alarm"), [8, 8, -1, 0.5, 50]),
        (("streams", "patch-0", "alarm"), [8, 8, 0, 1.5, 50]),
        (("streams", "patch-0", "alarm"), [8, True, 0, 0.5, 50]),
    ]
    for path, value in changes:
        state = json.loads(json.dumps(monitor.state()))
        target = state
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        yield pytest.param(state, id=f"{path[-1]}={value}")


@pytest.mark.parametrize("state", list(damaged()))
def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path: Path, state: Any) -> None:
    monitor = Monitor([MATCH, DENSITY])
    feed(monitor, np.full(3, 0.3), np.full(3, 0.3))
    before = monitor.state()
    (tmp_path / "monitor.json").write_text(json.dumps(state))
    with pytest.raises(StateError, match=r"monitor.json is damaged: "):
        monitor.load(tmp_path / "monitor.json")
    assert monitor.state() == before


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"3", b'{"settings": {}}'])
def test_a_file_that_holds_no_state_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "monitor.json").write_bytes(data)
    with pytest.raises(StateError, match=r"monitor.json"):
        Monitor([MATCH]).load(tmp_path / "monitor.json")


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor([MATCH])
    monitor.save(tmp_path / "monitor.json")
    monkeypatch.setattr(module, "_MAX_BYTES", 100)
    with pytest.raises(StateError, match="larger than 100 bytes"):
        monitor.load(tmp_path / "monitor.json")


def test_places_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"there is no file .*missing"):
        Monitor([MATCH]).load(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"cannot write .*monitor"):
        Monitor([MATCH]).save(tmp_path / "file" / "monitor.json")


@pytest.mark.parametrize("p_value", [-0.1, 1.1, math.nan, math.inf])
def test_a_p_value_out_of_range_is_refused_before_anything_is_taken_in(p_value: float) -> None:
    monitor = Monitor([MATCH, DENSITY])
    before = monitor.state()
    with pytest.raises(ValueError, match="between 0 and 1, that of 'density' is"):
        monitor.observe({"patch-0": 0.5, "density": p_value})
    with pytest.raises(ValueError, match="no stream 'other'"):
        monitor.observe({"patch-0": 0.5, "other": 0.5})
    assert monitor.state() == before


@pytest.mark.parametrize(("kind", "least"), [("attack", 19), ("drift", 1)])
def test_a_calibration_too_small_for_any_level_is_refused(kind: Kind, least: int) -> None:
    Monitor([WatchedScore("few", kind, least)])
    for size in (least - 1, 0, -5):
        with pytest.raises(ValueError, match=f"'few' needs at least {least} calibration scores, it has {size}"):
            Monitor([WatchedScore("few", kind, size)])


@pytest.mark.parametrize(
    ("streams", "options", "match"),
    [
        ([], {}, "at least one stream"),
        ([MATCH, MATCH], {}, "a name for each"),
        ([WatchedScore("x", "other", 99)], {}, "is of 'other'"),  # type: ignore[arg-type]
        ([MATCH], {"run_length": 1}, "run length"),
        ([MATCH], {"run_length": math.inf}, "run length"),
        ([MATCH], {"run_length": math.nan}, "run length"),
        ([MATCH], {"delta": 0}, "delta"),
        ([MATCH], {"delta": math.nan}, "delta"),
    ],
)
def test_settings_that_make_no_monitor_are_refused(
    streams: list[WatchedScore], options: dict[str, float], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        Monitor(streams, **options)
