"""What a decision does, and what happens when there is none: the one place that knows."""

from dataclasses import dataclass
from enum import StrEnum

import grpc
import numpy as np
from numpy.typing import NDArray

MAX_MESSAGE = 512
"""Characters of a refusal: it travels in a header, of which gRPC takes 8 KiB, and parts of it come from the client."""


class Decision(StrEnum):
    """Of a request, or of one image in it."""

    PASS = "pass"  # noqa: S105 - not a password
    FLAG = "flag"
    UNCHECKED = "unchecked"


class Mode(StrEnum):
    """What a decision does."""

    SHADOW = "shadow"
    """Metrics only; replies stay as they are."""
    TAG = "tag"
    """The reply says what was decided."""
    BLOCK = "block"
    """A flagged request is refused; others are tagged."""


class FailurePolicy(StrEnum):
    """What happens to a request that guard could not check."""

    OPEN = "open"
    """It is served, and marked `unchecked`."""
    CLOSED = "closed"
    """It is refused."""


class Reason(StrEnum):
    """Why a request is `unchecked`."""

    CANCELLED = "cancelled"
    DISABLED = "disabled"
    EMBEDDING_MISSING = "embedding_missing"
    ERROR = "error"
    INPUT_UNREADABLE = "input_unreadable"
    MODEL_NOT_VETTED = "model_not_vetted"
    MODEL_UNKNOWN = "model_unknown"
    NOT_SAMPLED = "not_sampled"
    OVERLOADED = "overloaded"
    PROTOCOL_UNKNOWN = "protocol_unknown"
    REPLY_UNMATCHED = "reply_unmatched"
    SHARED_MEMORY = "shared_memory"
    TIMEOUT = "timeout"
    UPSTREAM_FAILED = "upstream_failed"


_CLOSED: dict[Reason, tuple[grpc.StatusCode, str]] = {
    Reason.CANCELLED: (grpc.StatusCode.UNAVAILABLE, "the request was cancelled before it was checked"),
    Reason.EMBEDDING_MISSING: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the upstream reply carries no usable embedding, so the request could not be checked",
    ),
    Reason.ERROR: (grpc.StatusCode.UNAVAILABLE, "the request could not be checked: internal error"),
    Reason.INPUT_UNREADABLE: (grpc.StatusCode.INVALID_ARGUMENT, "the input could not be checked"),
    Reason.MODEL_NOT_VETTED: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the vetting of this model did not end with the verdict `no evidence`",
    ),
    Reason.MODEL_UNKNOWN: (grpc.StatusCode.FAILED_PRECONDITION, "there is no profile of this model"),
    Reason.OVERLOADED: (grpc.StatusCode.UNAVAILABLE, "too many requests wait to be checked"),
    Reason.PROTOCOL_UNKNOWN: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this is an inference in a protocol that cannot be checked",
    ),
    Reason.REPLY_UNMATCHED: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the reply could not be matched to a request of the stream, so it could not be checked",
    ),
    Reason.SHARED_MEMORY: (grpc.StatusCode.FAILED_PRECONDITION, "what lies in shared memory could not be checked"),
    Reason.TIMEOUT: (grpc.StatusCode.UNAVAILABLE, "the request could not be checked in time"),
    Reason.UPSTREAM_FAILED: (grpc.StatusCode.UNAVAILABLE, "the upstream server did not answer"),
}
"""Under `closed`: UNAVAILABLE where a retry may help, other codes where it will not. `disabled` and
`not_sampled` are never refused: the operator asked for them. docs/failures.md has the table for readers; a test
compares the two."""


@dataclass(frozen=True)
class Outcome:
    """What guard found out about one request.

    Attributes:
        decision: `flag` if any image is flagged; `unchecked` if guard could not decide.
        reason: Why it is `unchecked`; or why it would be, were it not flagged.
        detail: More about the reason, safe to send to a client.
        scores: One per image, shape [N]; None if nothing was scored, as are all that follow from them.
        flags: Which images are flagged, shape [N].
        p_values: How often a clean image scores as high, shape [N].
        alpha: p-value up to which an image is flagged.
        triggers: For each image, the id of the trigger that it matches best, or "".
        withdrawn: How many flags a second look took back.
        classes: For each image, the index of the class that it is predicted as, shape [N].
    """

    decision: Decision
    reason: Reason | None = None
    detail: str = ""
    scores: NDArray[np.float32] | None = None
    flags: NDArray[np.bool_] | None = None
    p_values: NDArray[np.float64] | None = None
    alpha: float | None = None
    triggers: tuple[str, ...] = ()
    withdrawn: int = 0
    classes: NDArray[np.int64] | None = None

    @classmethod
    def unchecked(cls, reason: Reason, detail: str = "") -> "Outcome":
        """Guard could not decide."""
        return cls(Decision.UNCHECKED, reason, detail)

    @property
    def others(self) -> Decision:
        """Of the images that are not flagged."""
        return Decision.PASS if self.reason is None else Decision.UNCHECKED

    @property
    def severity(self) -> int:
        """Of two outcomes that a reply may have, the one with more holds: flag, then unchecked, then pass."""
        return (Decision.PASS, Decision.UNCHECKED, Decision.FLAG).index(self.decision)


@dataclass(frozen=True)
class Refusal:
    """How a request is turned away.

    Attributes:
        code: gRPC status.
        message: For the client.
    """

    code: grpc.StatusCode
    message: str


def refusal(outcome: Outcome, mode: Mode, on_failure: FailurePolicy) -> Refusal | None:
    """Whether, and how, a request is refused; None if it is served.

    The failure policy holds in every mode: an operator who asked for `closed` gets it, in `shadow` too.
    """
    if outcome.decision is Decision.FLAG and mode is Mode.BLOCK:
        rows = [str(row) for row in np.flatnonzero(outcome.flags)] if outcome.flags is not None else []
        which = "" if outcome.flags is None or len(outcome.flags) == 1 else f" (image {', '.join(rows)} of the batch)"
        message = f"guard: the input looks like a backdoor trigger{which}"
        return Refusal(grpc.StatusCode.PERMISSION_DENIED, message[:MAX_MESSAGE])
    if outcome.reason in _CLOSED and on_failure is FailurePolicy.CLOSED:
        code, message = _CLOSED[outcome.reason]
        return Refusal(code, f"guard: {message}{': ' + outcome.detail if outcome.detail else ''}"[:MAX_MESSAGE])
    return None
