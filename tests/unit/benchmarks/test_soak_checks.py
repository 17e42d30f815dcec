"""What a soak must notice."""

import numpy as np
import pytest

from benchmarks.soak.checks import Check, delivered, noted
from benchmarks.soak.load import Ended
from benchmarks.soak.mixture import Counters, slope
from benchmarks.soak.restarts import AWAY, BROKEN, LOST, OTHER, REFUSED, Attempt, _cause


def message(number: int, outcome: str = "pass", *, kind: str = "clean", flags: tuple[bool, ...] = (False,)) -> Ended:
    return Ended(kind, number, flags, "unary", outcome)


def broken(checks: list[Check]) -> list[tuple[str, int]]:
    return [(check.what, check.found) for check in checks if not check.holds]


def test_deliveries_that_are_missing_doubled_forbidden_or_made_up() -> None:
    sent = [message(1), message(2, "CANCELLED"), message(3, "INVALID_ARGUMENT", kind="truncated")]
    assert not broken(delivered(sent, {1: 1}, ["truncated"]))
    assert not broken(delivered(sent, {1: 1, 2: 1}, ["truncated"]))
    assert broken(delivered(sent, {2: 1})) == [("answered, and delivered upstream other than once", 1)]
    assert broken(delivered(sent, {1: 1, 2: 2})) == [("delivered upstream more than once", 1)]
    assert broken(delivered(sent, {1: 1, 3: 1}, ["truncated"])) == [("refused beforehand, and delivered", 1)]
    assert broken(delivered(sent, {1: 1, 9: 1})) == [("delivered upstream, and never sent", 1)]


def test_records_of_evidence_that_are_missing_doubled_or_of_clean_images() -> None:
    sent = [message(1, "flag", flags=(False, True)), message(2, "CANCELLED", flags=(True,)), message(3)]
    assert not broken(noted(sent, [(1, 1)]))
    assert not broken(noted(sent, [(1, 1), (2, 0)]))
    assert not broken(noted(sent, [], dropped=1))
    assert broken(noted(sent, [])) == [("flagged images that the evidence log lacks", 1)]
    assert broken(noted(sent, [(1, 1), (1, 1)])) == [("images in it twice", 1)]
    assert broken(noted(sent, [(1, 1), (1, 0)])) == [("images in it that are not to be flagged", 1)]


@pytest.mark.parametrize(
    ("outcome", "reason", "details", "forwarded", "during", "cause"),
    [
        ("pass", "", "", True, "sidecar", "answered"),
        ("UNAVAILABLE", "upstream_failed", "Socket closed", True, "sidecar", AWAY),
        ("UNAVAILABLE", "", "guard: it cannot be reached (Connection refused)", False, "sidecar", AWAY),
        ("UNAVAILABLE", "", "Socket closed", True, "upstream", AWAY),
        ("UNAVAILABLE", "", "Socket closed", True, "sidecar", LOST),
        ("UNAVAILABLE", "", "Socket closed", False, "sidecar", BROKEN),
        ("UNAVAILABLE", "", "Connection refused", False, "sidecar", REFUSED),
        ("CANCELLED", "", "CANCELLED", False, "sidecar", OTHER),
        ("CANCELLED", "", "CANCELLED", True, "sidecar", LOST),
        ("INTERNAL", "", "", True, "upstream", OTHER),
        ("hung", "", "", False, "upstream", LOST),
        ("no reply", "", "", False, "sidecar", LOST),
    ],
)
def test_a_request_is_lost_if_it_was_accepted_and_nobody_answered(
    outcome: str, reason: str, details: str, during: str, cause: str, *, forwarded: bool
) -> None:
    ended = Ended("clean", 1, (False,), "unary", outcome, reason, details)
    assert _cause(Attempt(ended, during), {1} if forwarded else {}) == cause


def test_counters_are_added_up_by_label() -> None:
    counters = Counters(['requests{model="a",decision="pass"} 2.0', 'requests{decision="flag"} 3.0', "requests_x 9.0"])
    assert counters.sum("requests") == 5
    assert counters.sum("requests", decision="pass") == 2


def test_the_slope_of_a_line_and_its_uncertainty() -> None:
    times, noise = np.linspace(0, 1, 600), np.random.default_rng(0).normal(size=600)
    assert slope(times, 3 * times + 100) == pytest.approx((3, 0), abs=1e-9)
    rate, error = slope(times, 3 * times + noise)
    # Of independent noise: 1 / sqrt(600 / 12).
    assert error == pytest.approx(0.14, rel=0.5)
    assert abs(rate - 3) < 4 * error
