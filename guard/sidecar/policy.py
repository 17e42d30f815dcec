"""The effect of a decision, and of a missing one; no other module decides this."""

from dataclasses import dataclass, replace
from enum import StrEnum

import grpc
import numpy as np
from numpy.typing import NDArray

MAX_MESSAGE = 512
"""Longest message of a refusal: it travels in a header, which gRPC limits to 8 KiB, and parts come from the client."""


class Decision(StrEnum):
    """The decision on a request, or on one image in it."""

    PASS = "pass"  # noqa: S105 - not a password
    FLAG = "flag"
    UNCHECKED = "unchecked"


class Mode(StrEnum):
    """The effect that a decision has."""

    SHADOW = "shadow"
    """Decisions are only counted in the metrics; replies are not changed."""
    TAG = "tag"
    """Decisions are reported in the replies."""
    BLOCK = "block"
    """Flagged requests are refused; decisions on others are reported in the replies."""


class FailurePolicy(StrEnum):
    """The treatment of a request that guard could not check."""

    OPEN = "open"
    """The request is served and marked as `unchecked`."""
    CLOSED = "closed"
    """The request is refused."""


class Reason(StrEnum):
    """Why a request is `unchecked`."""

    CANCELLED = "cancelled"
    DISABLED = "disabled"
    EMBEDDING_MISSING = "embedding_missing"
    ERROR = "error"
    INPUT_UNREADABLE = "input_unreadable"
    MODEL_NOT_CERTIFIED = "model_not_certified"
    MODEL_NOT_VETTED = "model_not_vetted"
    MODEL_UNKNOWN = "model_unknown"
    NOT_SAMPLED = "not_sampled"
    OVERLOADED = "overloaded"
    PROTOCOL_UNKNOWN = "protocol_unknown"
    REPLY_UNMATCHED = "reply_unmatched"
    SHARED_MEMORY = "shared_memory"
    TIMEOUT = "timeout"
    UPSTREAM_FAILED = "upstream_failed"


_OF_IMAGES = frozenset({Reason.INPUT_UNREADABLE, Reason.EMBEDDING_MISSING})
"""Reasons that may concern some images of a request only."""
_CLOSED: dict[Reason, tuple[grpc.StatusCode, str]] = {
    Reason.CANCELLED: (grpc.StatusCode.UNAVAILABLE, "the request was cancelled before it was checked"),
    Reason.EMBEDDING_MISSING: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the upstream reply carries no usable embedding, so the request could not be checked",
    ),
    Reason.ERROR: (grpc.StatusCode.UNAVAILABLE, "the request could not be checked: internal error"),
    Reason.INPUT_UNREADABLE: (grpc.StatusCode.INVALID_ARGUMENT, "the input could not be checked"),
    Reason.MODEL_NOT_CERTIFIED: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this model has no certificate that is accepted",
    ),
    Reason.MODEL_NOT_VETTED: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the vetting of this model did not end with the verdict `no evidence`",
    ),
    Reason.MODEL_UNKNOWN: (grpc.StatusCode.FAILED_PRECONDITION, "there is no profile of this model"),
    Reason.OVERLOADED: (grpc.StatusCode.UNAVAILABLE, "too many requests wait to be checked"),
    Reason.PROTOCOL_UNKNOWN: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this call or reply is of a protocol that cannot be checked",
    ),
    Reason.REPLY_UNMATCHED: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the reply could not be matched to a request of the stream, so it could not be checked",
    ),
    Reason.SHARED_MEMORY: (grpc.StatusCode.FAILED_PRECONDITION, "data in shared memory could not be checked"),
    Reason.TIMEOUT: (grpc.StatusCode.UNAVAILABLE, "the request could not be checked in time"),
    Reason.UPSTREAM_FAILED: (grpc.StatusCode.UNAVAILABLE, "the upstream server did not answer"),
}
"""Refusals under the policy `closed`: UNAVAILABLE where a retry may help, other codes where it will not. The reasons
`disabled` and `not_sampled` are never refused, because the operator asked for them. docs/failures.md shows this table
to readers, and a test compares the two."""


@dataclass(frozen=True)
class Outcome:
    """What guard found out about one request.

    Attributes:
        decision: `flag` if any image is flagged; `unchecked` if guard could not decide.
        reason: Why the request is `unchecked`, or would be if it were not flagged; None if it was checked.
        detail: Details of the reason, safe to send to a client.
        scores: Scores of the images, shape [N]; NaN for those that are in `unread`. They and all that follows from them
            are None if nothing was scored.
        flags: Which images are flagged, shape [N].
        p_values: Conformal p-values, shape [N]: how often a clean image scores as high; NaN for those in `unread`.
        alpha: p-value up to which an image is flagged.
        decided_by: For each image, the name of the score that decides; "" for those that were not scored.
        triggers: For each image, the id of the trigger that it matches, if the match to a trigger decides; else "".
        answers: For each image, the name of the class that the reference model answers; "" without a second opinion.
        divergences: How far the answers of the model and of the reference model are apart, in nats
            (`guard.screening.SecondOpinion`), shape [N]; NaN without a second opinion.
        residuals: How far the embeddings of the two are apart, shape [N]; NaN without a second opinion.
        withdrawn: Number of flags that a second look withdrew.
        classes: Index of the predicted class of each image, shape [N]; −1 for those in `unread`.
        unread: Which images could not be scored, shape [N]; None if none is known to be such.
    """

    decision: Decision
    reason: Reason | None = None
    detail: str = ""
    scores: NDArray[np.float32] | None = None
    flags: NDArray[np.bool_] | None = None
    p_values: NDArray[np.float64] | None = None
    alpha: float | None = None
    decided_by: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    divergences: NDArray[np.float32] | None = None
    residuals: NDArray[np.float32] | None = None
    withdrawn: int = 0
    classes: NDArray[np.int64] | None = None
    unread: NDArray[np.bool_] | None = None

    @classmethod
    def unchecked(cls, reason: Reason, detail: str = "") -> "Outcome":
        """The outcome if guard could not decide."""
        return cls(Decision.UNCHECKED, reason, detail)

    def doubted(self, reason: Reason, detail: str = "") -> "Outcome":
        """The outcome if another reason is found for which the request counts as unchecked; a flag remains a flag."""
        if self.decision is Decision.FLAG:
            return self if self.reason in _CLOSED else replace(self, reason=reason, detail=detail)
        return self if self.decision is Decision.UNCHECKED else Outcome.unchecked(reason, detail)

    @property
    def decisions(self) -> list[Decision]:
        """The decision on each image; an empty list if nothing was scored."""
        if self.flags is None:
            return []
        some = self.reason in _OF_IMAGES and self.unread is not None
        unread = self.unread if some and self.unread is not None else np.full(len(self.flags), self.reason is not None)
        return [
            Decision.FLAG if flag else Decision.UNCHECKED if missing else Decision.PASS
            for flag, missing in zip(self.flags, unread, strict=True)
        ]

    @property
    def worst(self) -> int:
        """The number of the most suspicious image that was scored."""
        if self.scores is None or self.p_values is None:
            raise ValueError("nothing was scored")
        return int(np.lexsort((-self.scores, self.p_values))[0])  # NaN comes last

    @property
    def asked(self) -> bool:
        """Whether any image got a second opinion."""
        return any(self.answers)

    @property
    def severity(self) -> int:
        """Rank of the outcome; of two outcomes that apply to one reply, the higher one counts."""
        return (Decision.PASS, Decision.UNCHECKED, Decision.FLAG).index(self.decision)


@dataclass(frozen=True)
class Refusal:
    """How a request is refused.

    Attributes:
        code: The gRPC status code.
        message: Message that is sent to the client.
    """

    code: grpc.StatusCode
    message: str


def refusal(outcome: Outcome, mode: Mode, on_failure: FailurePolicy) -> Refusal | None:
    """The refusal of a request; None if it is served.

    The failure policy applies in every mode: an operator who asked for `closed` gets it, in `shadow` mode too.
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
