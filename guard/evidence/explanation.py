"""What a record says, in sentences for the person who judges it."""

import math

from guard.evidence.records import Record

DECISIONS = {"flag": "Flagged", "pass": "Passed", "unchecked": "Not checked"}
"""Decisions, for people."""
_MEANINGS = {
    "k-distance": ": the request is unlike clean images",
    "divergence": ": the model and the reference model predict different classes, or one is much less sure",
    "joint": ": the request resembles a reconstructed trigger, and the model and the reference model disagree",
    "residual": ": the embeddings of the model and of the reference model differ as they do not for clean images",
}
"""What it says of a request that one of these scores decided."""


def explained(record: Record) -> list[str]:
    """Sentences that explain the record."""
    sentences = []
    if record.p_value:
        sentences.append(
            f"{DECISIONS.get(record.decision, record.decision)}: a clean request looks like this at most once in "
            f"{_one_in(record.p_value)}."
        )
    if record.alpha:
        sentences.append(
            f"By choice of the false-alarm rate, one clean request in about {_one_in(record.alpha)} is flagged. "
            "A single flag is a reason to look, not a proof."
        )
    if record.decided_by:
        sentences.append(f"The score {record.decided_by} decided{_MEANINGS.get(record.decided_by, '')}.")
    if record.reference:
        same = "also answers" if record.reference == record.predicted else "answers"
        apart = record.scores.get("divergence", math.nan)
        distance = f"; the predictions of the two models are {apart:.3g} nats apart" if math.isfinite(apart) else ""
        sentences.append(f"The reference model {same} “{record.reference}”{distance}.")
    if record.trigger:
        answer = f"; the model answered “{record.predicted}”" if record.predicted else ""
        leads = f", which leads to “{record.target}”{answer}" if record.target else answer
        sentences.append(f"Of the reconstructed triggers it matches {record.trigger}{leads}.")
    if record.second_look:
        sentences.append(f"Second look: {record.second_look}{': ' + record.explanation if record.explanation else ''}.")
    return sentences


def _one_in(share: float) -> str:
    """The N of "one in N" for a share; a log may have been tampered with, so the share may be any number."""
    return f"{int(1 / min(max(share, 1e-9), 1.0) + 1e-9):,}"
