import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from guard.errors import StateError
from guard.screening import Banks, Detector, Screen, axis_state
from guard.screening.axis import (
    MAX_ROWS,
    WINDOW,
    Axis,
    AxisMonitor,
    AxisReference,
    AxisScores,
    _Sums,
    along,
    densest,
    fit_tail,
)

Floats = NDArray[np.float32]
CLASSES, WIDTH, TARGET = 5, 48, 2
HEAD = np.eye(WIDTH, CLASSES, dtype=np.float32)


def unit(values: NDArray[np.floating]) -> Floats:
    found: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return found


def clean(count: int, seed: int, *, noise: float = 0.08) -> Floats:
    generator = np.random.default_rng(seed)
    spread = noise * generator.normal(size=(count, WIDTH))
    return unit(HEAD.T[generator.integers(CLASSES, size=count)] + spread)


def triggered(count: int, seed: int, *, column: int = -1, target: int = TARGET) -> Floats:
    """Images that all look alike to the model: near the target, and moved along one column."""
    generator = np.random.default_rng(seed)
    moved = HEAD.T[target] + 0.04 * generator.normal(size=(count, WIDTH))
    moved[:, column] += 0.8
    return unit(moved)


def mixed(count: int, share: float, seed: int) -> Floats:
    where = np.random.default_rng(seed).random(count) < share
    return np.where(where[:, None], triggered(count, seed + 1), clean(count, seed + 2))


def observe(monitor: AxisMonitor, embeddings: Floats, tags: list[object] | None = None) -> list[Axis]:
    return [alarm.axis for alarm in monitor.observe(embeddings, (embeddings @ HEAD).argmax(1), tags)]


@pytest.fixture(scope="module")
def reference() -> AxisReference:
    return AxisReference.fit(clean(1000, 0), clean(1000, 1), HEAD)


def test_the_bound_holds_for_a_fresh_rate_along_a_direction() -> None:
    generator, exceeded = np.random.default_rng(0), 0
    for _ in range(300):
        bound = fit_tail(generator.exponential(size=300).astype(np.float32), 0.1)
        exceeded += any(bound.p_value(x) < math.exp(-x) for x in (3.0, 5.0, 8.0))
    assert exceeded <= 45  # delta = 0.1, with room for chance
    assert fit_tail(generator.normal(size=300).astype(np.float32), 0.1).p_value(-9.0) == 1.0


def test_sums_that_skip_requests_are_those_that_are_kept_up_with_each() -> None:
    generator, number = np.random.default_rng(0), 0
    lazy, eager = _Sums(2, 1e300), _Sums(1, 1e300)
    for _ in range(400):
        number += 1
        mine = generator.random() < 0.2
        p_value = float(10 ** generator.uniform(-5, 0)) if mine else 1.0
        eager.observe(0, p_value, number)
        if mine:
            lazy.observe(1, p_value, number)
    lazy.observe(1, 1.0, number + 1)
    eager.observe(0, 1.0, number + 1)
    np.testing.assert_allclose(lazy.sums[1], eager.sums[0], rtol=1e-9)


def test_the_capital_of_clean_requests_grows_by_one_each_on_average() -> None:
    generator, totals = np.random.default_rng(1), []
    for _ in range(100):
        sums = _Sums(1, 1e300)
        for number in range(1, 201):
            sums.observe(0, float(generator.random()), number)
        totals.append(sums.sums[0, 0, -1, 0])
    assert np.mean(totals) == pytest.approx(200, rel=0.15)


@pytest.mark.parametrize(("share", "within"), [(0.01, 2000), (0.05, 400)])
def test_a_cluster_in_the_traffic_is_found_with_its_class_and_share(
    reference: AxisReference, share: float, within: int
) -> None:
    monitor = AxisMonitor(reference)
    (axis,) = observe(monitor, mixed(within, share, 5))
    assert axis.target == TARGET
    assert axis.name == "axis-1"
    assert share / 3 < axis.share < share * 3
    assert axis.bound < axis.share
    assert axis.within > 0.7
    fresh = triggered(200, 99)
    classes = (fresh @ HEAD).argmax(1)
    assert along([axis], reference, reference.residuals(fresh, classes), classes).mean() > 0.8
    # What is explained raises no further alarm.
    assert not observe(monitor, mixed(2000, share, 6))


def test_clean_traffic_raises_no_alarm(reference: AxisReference) -> None:
    for seed in range(3):
        assert not observe(AxisMonitor(reference), clean(2500, 100 + seed))


@pytest.mark.parametrize("noise", [0.12, 0.2])
def test_drift_of_all_classes_is_no_cluster(reference: AxisReference, noise: float) -> None:
    drifted = clean(4000, 7, noise=noise)
    drifted[:, -2] += 0.1  # all images move the same way
    assert not observe(AxisMonitor(reference), unit(drifted))


def test_one_image_that_is_sent_again_and_again_is_no_cluster(reference: AxisReference) -> None:
    stream = clean(3000, 8)
    stream[::20] = triggered(1, 9)
    assert not observe(AxisMonitor(reference), stream)


def test_the_requests_that_formed_an_axis_come_back_with_the_alarm(reference: AxisReference) -> None:
    share = np.random.default_rng(3).random(600) < 0.05
    stream = np.where(share[:, None], triggered(600, 4), clean(600, 5))
    monitor = AxisMonitor(reference)
    (alarm,) = monitor.observe(stream, (stream @ HEAD).argmax(1), list(range(600)))
    assert len(alarm.tags) >= 4
    assert np.mean(share[list(alarm.tags)]) > 0.8


def test_the_axis_flags_single_requests_and_the_false_alarm_rate_stays(reference: AxisReference) -> None:
    bank, behind = clean(1000, 0), clean(1000, 1)
    screen = Screen(Banks.fit(bank, {}, HEAD, k=4))
    before = Detector(screen, screen.score_samples(behind), 0.01)
    (axis,) = observe(AxisMonitor(reference), mixed(600, 0.05, 5))
    after = before.along(AxisScores([axis], reference))
    found = after.score(triggered(500, 50))
    assert found.flags.mean() > 0.95
    assert {after.triggers[index] for index in found.scores.triggers[found.flags]} == {"axis-1"}
    assert "axis-1" in found.scores.parts
    rates = after.score(clean(20_000, 51)).flags.mean()
    assert rates < 0.02
    assert after.observations(found.scores)[0].keys() == before.observations(found.scores)[0].keys()


def test_no_rows_near_each_other_make_no_candidate() -> None:
    assert densest(np.eye(10, dtype=np.float32), np.eye(10, dtype=np.float32)) is None


def test_memory_is_bounded_and_the_class_that_was_seen_last_is_kept() -> None:
    width, classes = 8, 60
    generator = np.random.default_rng(0)
    head = unit(generator.normal(size=(classes, width))).T
    everything = unit(generator.normal(size=(6000, width)))
    reference = AxisReference.fit(everything[:2000], everything[2000:2400], head)
    monitor = AxisMonitor(reference)
    for _ in range(4):
        fresh = unit(generator.normal(size=(3000, width)))
        monitor.observe(fresh, (fresh @ head).argmax(1))
    stored = [window.count for window in monitor.windows.values()]
    assert sum(stored) <= MAX_ROWS
    assert max(stored) <= WINDOW


def test_a_restart_goes_on_where_it_was(reference: AxisReference, tmp_path: Path) -> None:
    stream = mixed(900, 0.03, 11)
    whole, first, second = (AxisMonitor(reference) for _ in range(3))
    expected = observe(whole, stream)
    found = observe(first, stream[:150])
    axis_state.write(tmp_path / "axis", axis_state.dump(first))
    axis_state.restore(second, tmp_path / "axis")
    found += observe(second, stream[150:])
    assert [axis.target for axis in found] == [axis.target for axis in expected] == [TARGET]
    assert abs(found[0].observed - expected[0].observed) < 100
    axis_state.write(tmp_path / "axis", axis_state.dump(second))
    (stored,) = axis_state.read_axes(tmp_path / "axis", reference)
    np.testing.assert_array_equal(stored.offset, found[0].offset)
    third = AxisMonitor(reference)
    axis_state.restore(third, tmp_path / "axis")
    assert not observe(third, mixed(1500, 0.03, 12))  # it is known


def test_the_state_of_another_calibration_is_not_continued(reference: AxisReference, tmp_path: Path) -> None:
    axis_state.write(tmp_path / "axis", axis_state.dump(AxisMonitor(reference)))
    other = AxisReference.fit(clean(1000, 0), clean(1000, 2), HEAD)
    with pytest.raises(StateError, match="another calibration or other settings"):
        axis_state.restore(AxisMonitor(other), tmp_path / "axis")
    axis_state.restore(AxisMonitor(reference, run_length=1e6), tmp_path / "axis")  # whose axes are as true
    with pytest.raises(StateError, match="another model"):
        axis_state.read_axes(tmp_path / "axis", AxisReference.fit(clean(1000, 3), clean(1000, 1), HEAD))


def damaged(name: str, data: bytes) -> bytes:
    tensors = {key: values.copy() for key, values in load(data).items()}
    document = json.loads(tensors["document"].tobytes())
    if name == "cut":
        return data[:-7]
    if name == "empty":
        return b""
    if name == "infinite":
        tensors["sums"][0, 0] = math.inf
    elif name == "negative":
        tensors["sums"][0, 0] = -1
    elif name == "won":
        tensors["sums"][0, 0] = 1e300
    elif name == "long":
        tensors["rows"] *= 5
    elif name == "label":
        tensors["recent_classes"][0] = 10**6
    elif name == "future":
        tensors["last"][0] = 10**9
    elif name == "shape":
        tensors["rows"] = tensors["rows"][:-1]
    elif name == "offset":
        tensors["offsets"] *= 0
    elif name == "missing":
        del tensors["recent"]
    elif name == "target":
        document["axes"][0]["target"] = CLASSES
    elif name == "share":
        document["axes"][0]["share"] = 7.0
    elif name == "name":
        document["axes"][0]["name"] = "<b>"
    elif name == "windows":
        document["windows"] = document["windows"][:1] * 2
    elif name == "text":
        return save({**tensors, "document": np.frombuffer(b"nonsense", np.uint8)})
    tensors["document"] = np.frombuffer(json.dumps(document).encode(), np.uint8)
    return bytes(save(tensors))


@pytest.mark.parametrize(
    "name",
    ["cut", "empty", "infinite", "negative", "won", "long", "label", "future", "shape", "offset", "missing",
     "target", "share", "name", "windows", "text"],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_changes_nothing(name: str, reference: AxisReference, tmp_path: Path) -> None:
    monitor = AxisMonitor(reference)
    assert observe(monitor, mixed(600, 0.05, 5))
    path = tmp_path / "axis"
    path.write_bytes(damaged(name, axis_state.dump(monitor)))
    fresh = AxisMonitor(reference)
    before = axis_state.dump(fresh)
    with pytest.raises(StateError):
        axis_state.restore(fresh, path)
    assert axis_state.dump(fresh) == before


def test_settings_that_make_no_sense(reference: AxisReference) -> None:
    few = dataclasses.replace(reference, clean=reference.clean[:50])
    with pytest.raises(ValueError, match="needs at least 200 calibration images, there are 50"):
        AxisMonitor(few)
    with pytest.raises(ValueError, match="out of range"):
        AxisMonitor(reference, run_length=0.5)
