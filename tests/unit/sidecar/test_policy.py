import itertools
import re
from pathlib import Path

import grpc
import numpy as np
import pytest

from guard.sidecar import Decision, FailurePolicy, Mode, Outcome, Reason, refusal

CODES = {
    Reason.CANCELLED: grpc.StatusCode.UNAVAILABLE,
    Reason.DISABLED: None,
    Reason.EMBEDDING_MISSING: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ERROR: grpc.StatusCode.UNAVAILABLE,
    Reason.INPUT_UNREADABLE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_CERTIFIED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.MODEL_NOT_VETTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.MODEL_UNKNOWN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_SAMPLED: None,
    Reason.OVERLOADED: grpc.StatusCode.UNAVAILABLE,
    Reason.PROTOCOL_UNKNOWN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.REPLY_UNMATCHED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.SHARED_MEMORY: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.TIMEOUT: grpc.StatusCode.UNAVAILABLE,
    Reason.UPSTREAM_FAILED: grpc.StatusCode.UNAVAILABLE,
}
ASKED_FOR = {Reason.DISABLED, Reason.NOT_SAMPLED}


def checked(*flags: bool) -> Outcome:
    array = np.array(flags, dtype=np.bool_)
    decision = Decision.FLAG if array.any() else Decision.PASS
    return Outcome(
        decision,
        scores=array.astype(np.float32),
        flags=array,
        p_values=np.where(array, 0.01, 1.0),
        alpha=0.05,
        triggers=("",) * len(flags),
    )


@pytest.mark.parametrize(("reason", "policy", "mode"), list(itertools.product(Reason, FailurePolicy, Mode)))
def test_what_could_not_be_checked_follows_the_failure_policy_in_every_mode(
    reason: Reason, policy: FailurePolicy, mode: Mode
) -> None:
    refused = refusal(Outcome.unchecked(reason), mode, policy)
    if policy is FailurePolicy.OPEN or CODES[reason] is None:
        assert refused is None
    else:
        assert refused is not None
        assert refused.code is CODES[reason]
        assert refused.message.startswith("guard: ")


def test_the_documented_table_is_the_one_in_force() -> None:
    text = (Path(__file__).parents[3] / "docs" / "failures.md").read_text(encoding="utf-8")
    table = text.partition("## In front of an upstream server")[2].partition("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.MULTILINE))
    expected = {reason.value: "served" if code is None else code.name for reason, code in CODES.items()}
    # There is no reply of guard's own to fall back from.
    expected["upstream_failed"] = "its error"
    assert rows == expected


def test_every_reason_is_refused_under_closed_but_what_the_operator_asked_for() -> None:
    assert set(CODES) == set(Reason)
    assert {reason for reason, code in CODES.items() if code is None} == ASKED_FOR


@pytest.mark.parametrize(("reason", "mode"), list(itertools.product(Reason, Mode)))
def test_under_closed_nothing_unchecked_is_served_as_pass(reason: Reason, mode: Mode) -> None:
    outcome = Outcome.unchecked(reason)
    served = refusal(outcome, mode, FailurePolicy.CLOSED) is None
    assert outcome.decision is Decision.UNCHECKED
    assert not served or reason in ASKED_FOR


@pytest.mark.parametrize(("mode", "policy"), list(itertools.product(Mode, FailurePolicy)))
def test_a_flagged_request_is_refused_in_block_mode_only(mode: Mode, policy: FailurePolicy) -> None:
    refused = refusal(checked(*[True]), mode, policy)
    if mode is Mode.BLOCK:
        assert refused is not None
        assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    else:
        assert refused is None


@pytest.mark.parametrize(("mode", "policy", "rows"), list(itertools.product(Mode, FailurePolicy, (1, 3))))
def test_a_request_that_passes_is_served_everywhere(mode: Mode, policy: FailurePolicy, rows: int) -> None:
    assert refusal(checked(*[False] * rows), mode, policy) is None


@pytest.mark.parametrize(
    ("flags", "ending"),
    [
        ((True,), "trigger"),
        ((False, True), "trigger (image 1 of the batch)"),
        ((True, False, True), "trigger (image 0, 2 of the batch)"),
    ],
)
def test_a_refusal_names_the_flagged_rows_of_a_batch(flags: tuple[bool, ...], ending: str) -> None:
    refused = refusal(checked(*flags), Mode.BLOCK, FailurePolicy.CLOSED)
    assert refused is not None
    assert refused.message.endswith(ending)


def test_a_refusal_carries_the_detail() -> None:
    outcome = Outcome.unchecked(Reason.INPUT_UNREADABLE, "input 'image' is damaged")
    refused = refusal(outcome, Mode.TAG, FailurePolicy.CLOSED)
    assert refused is not None
    assert refused.message == "guard: the input could not be checked: input 'image' is damaged"


def test_a_refusal_fits_into_a_header() -> None:
    long = refusal(Outcome.unchecked(Reason.INPUT_UNREADABLE, "ü" * 100_000), Mode.TAG, FailurePolicy.CLOSED)
    many = refusal(checked(*[True] * 65_536), Mode.BLOCK, FailurePolicy.CLOSED)
    for refused in (long, many):
        assert refused is not None
        assert len(refused.message) < 1000
