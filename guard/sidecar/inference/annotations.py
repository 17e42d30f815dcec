"""How a reply carries the decision: as parameters, as trailing metadata and, for a batch, as one output per value."""

import string
from collections.abc import Iterable
from urllib.parse import quote

import numpy as np

from guard.protocol.inference_pb2 import ModelInferResponse
from guard.protocol.messages import remove_output
from guard.protocol.tensors import add_output
from guard.sidecar.policy import Decision, Mode, Outcome

DECISION, SCORE, P_VALUE, ALPHA, REASON, MODE, TRIGGER, WITHDRAWN = (
    f"guard_{name}" for name in ("decision", "score", "p_value", "alpha", "reason", "mode", "trigger", "withdrawn")
)
DECIDED_BY, REFERENCE, DIVERGENCE, RESIDUAL = (
    f"guard_{name}" for name in ("decided_by", "reference", "divergence", "residual")
)

_PRINTABLE = "".join(set(string.punctuation) - {"%"}) + " "
_LONGEST = 64
"""Characters of a name that metadata carry: gRPC limits them to 8 KiB, and a class may have a long name."""


def edit_reply(response: ModelInferResponse, outcome: Outcome, mode: Mode, hide: Iterable[str]) -> bool:
    """Annotate a reply unless the mode is `shadow`, and remove outputs that the client did not ask for.

    Args:
        response: The reply, which is changed.
        outcome: The outcome of its request.
        mode: The mode of its model.
        hide: Names of the outputs to remove.

    Returns:
        Whether the reply was changed; if not, its original bytes can be forwarded.
    """
    hidden = [name for name in hide if remove_output(response, name)]
    tag = mode is not Mode.SHADOW
    if tag:
        annotate(response, outcome, mode)
    return bool(hidden) or tag


def annotate(response: ModelInferResponse, outcome: Outcome, mode: Mode) -> None:
    """Write an outcome into a reply.

    Parameters describe the request as a whole: its decision, its smallest p-value, and the alpha up to which an image
    is flagged, and of the most suspicious image the score, its name, and, with a second opinion, the class that the
    reference model answers and how far the two models are apart. A reply to more than one image also gets the outputs
    `guard_decision`, `guard_decided_by` (BYTES [N]), `guard_score` and `guard_p_value` (FP32 [N]), and, if any image
    got a second opinion, `guard_reference` (BYTES [N]), `guard_divergence` and `guard_residual` (FP32 [N]). What an
    image lacks is NaN or an empty text. They are raw if the other outputs are raw, and typed otherwise. They are left
    out if the reply has another number of raw contents than of outputs, since a client could not tell which belong
    together.
    """
    parameters = response.parameters
    parameters[DECISION].string_param = outcome.decision
    parameters[MODE].string_param = mode
    if outcome.reason is not None:
        parameters[REASON].string_param = outcome.reason
    if outcome.scores is None or outcome.flags is None or outcome.p_values is None or outcome.alpha is None:
        return
    worst = outcome.worst
    parameters[SCORE].double_param = float(outcome.scores[worst])
    parameters[P_VALUE].double_param = float(outcome.p_values[worst])
    parameters[ALPHA].double_param = outcome.alpha
    for name, value in _opinion(outcome, worst).items():
        if isinstance(value, str):
            parameters[name].string_param = value
        else:
            parameters[name].double_param = value
    if outcome.decision is Decision.FLAG and outcome.triggers[worst]:
        parameters[TRIGGER].string_param = outcome.triggers[worst]
    if outcome.withdrawn:
        parameters[WITHDRAWN].int64_param = outcome.withdrawn
    raw = bool(response.raw_output_contents)
    if len(outcome.scores) > 1 and (not raw or len(response.raw_output_contents) == len(response.outputs)):
        add_output(response, DECISION, [decision.encode() for decision in outcome.decisions], raw=raw)
        add_output(response, SCORE, outcome.scores, raw=raw)
        add_output(response, P_VALUE, outcome.p_values.astype(np.float32), raw=raw)
        add_output(response, DECIDED_BY, [name.encode() for name in outcome.decided_by], raw=raw)
        if outcome.asked and outcome.divergences is not None and outcome.residuals is not None:
            add_output(response, REFERENCE, [name.encode() for name in outcome.answers], raw=raw)
            add_output(response, DIVERGENCE, outcome.divergences, raw=raw)
            add_output(response, RESIDUAL, outcome.residuals, raw=raw)


def _opinion(outcome: Outcome, row: int) -> dict[str, str | float]:
    """Which score decides about an image, and what the reference model says of it, by the names of the parameters."""
    found: dict[str, str | float] = {DECIDED_BY: outcome.decided_by[row]}
    if outcome.answers[row] and outcome.divergences is not None and outcome.residuals is not None:
        found[REFERENCE] = outcome.answers[row]
        found[DIVERGENCE], found[RESIDUAL] = float(outcome.divergences[row]), float(outcome.residuals[row])
    return found


def trailers(outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """An outcome as trailing metadata: for clients that do not parse replies, and for refusals, which have no reply."""
    pairs = [("guard-decision", str(outcome.decision))]
    if outcome.reason is not None:
        pairs.append(("guard-reason", str(outcome.reason)))
    if outcome.scores is not None and outcome.p_values is not None and outcome.alpha is not None:
        pairs += [
            ("guard-score", f"{np.nanmax(outcome.scores):.6g}"),
            ("guard-p-value", f"{np.nanmin(outcome.p_values):.6g}"),
            ("guard-alpha", f"{outcome.alpha:g}"),
        ]
        pairs += [(_key(name), _value(value)) for name, value in _opinion(outcome, outcome.worst).items()]
    return tuple(pairs)


def _key(name: str) -> str:
    """The key of metadata for a parameter."""
    return name.replace("_", "-")


def _value(value: str | float) -> str:
    """A value of metadata, which is short and printable ASCII: the other characters of a class name are escaped."""
    return f"{value:.6g}" if isinstance(value, float) else quote(value[:_LONGEST], safe=_PRINTABLE)
