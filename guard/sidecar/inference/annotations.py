"""How a reply carries the decision: as parameters, as trailing metadata and, for a batch, as one output per value."""

from collections.abc import Iterable

import numpy as np

from guard.protocol.inference_pb2 import ModelInferResponse
from guard.protocol.messages import remove_output
from guard.protocol.tensors import add_output
from guard.sidecar.policy import Decision, Mode, Outcome

DECISION, SCORE, P_VALUE, ALPHA, REASON, MODE, TRIGGER, WITHDRAWN = (
    f"guard_{name}" for name in ("decision", "score", "p_value", "alpha", "reason", "mode", "trigger", "withdrawn")
)


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
    is flagged. A reply to more than one image also gets the outputs `guard_decision` (BYTES [N]), `guard_score` and
    `guard_p_value` (FP32 [N]), which are NaN for an image that could not be scored. They are raw if the other outputs
    are raw, and typed otherwise. They are left out if the reply has another number of raw contents than of outputs,
    since a client could not tell which belong together.
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
    if outcome.decision is Decision.FLAG and outcome.triggers[worst]:
        parameters[TRIGGER].string_param = outcome.triggers[worst]
    if outcome.withdrawn:
        parameters[WITHDRAWN].int64_param = outcome.withdrawn
    raw = bool(response.raw_output_contents)
    if len(outcome.scores) > 1 and (not raw or len(response.raw_output_contents) == len(response.outputs)):
        add_output(response, DECISION, [decision.encode() for decision in outcome.decisions], raw=raw)
        add_output(response, SCORE, outcome.scores, raw=raw)
        add_output(response, P_VALUE, outcome.p_values.astype(np.float32), raw=raw)


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
    return tuple(pairs)
