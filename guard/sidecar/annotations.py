"""How a reply tells what guard decided: parameters, trailing metadata, and for batches one tensor each."""

from guard.sidecar.inference_pb2 import ModelInferResponse
from guard.sidecar.policy import Decision, Mode, Outcome
from guard.sidecar.tensors import add_output

DECISION, SCORE, THRESHOLD, REASON, MODE, TRIGGER = (
    f"guard_{name}" for name in ("decision", "score", "threshold", "reason", "mode", "trigger")
)


def annotate(response: ModelInferResponse, outcome: Outcome, mode: Mode) -> None:
    """Write an outcome into a reply.

    Parameters carry the whole request: its decision, its largest score, the threshold. A reply to more than one image
    also gets the outputs `guard_decision` (BYTES [N]) and `guard_score` (FP32 [N]).
    """
    parameters = response.parameters
    parameters[DECISION].string_param = outcome.decision
    parameters[MODE].string_param = mode
    if outcome.reason is not None:
        parameters[REASON].string_param = outcome.reason
    if outcome.scores is None or outcome.flags is None or outcome.threshold is None:
        return
    worst = int(outcome.scores.argmax())
    parameters[SCORE].double_param = float(outcome.scores[worst])
    parameters[THRESHOLD].double_param = outcome.threshold
    if outcome.decision is Decision.FLAG and outcome.triggers[worst]:
        parameters[TRIGGER].string_param = outcome.triggers[worst]
    if len(outcome.scores) > 1:
        raw = bool(response.raw_output_contents)
        decisions = [(Decision.FLAG if flag else Decision.PASS).encode() for flag in outcome.flags]
        add_output(response, DECISION, decisions, raw=raw)
        add_output(response, SCORE, outcome.scores, raw=raw)


def trailers(outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """The same as trailing metadata, for those who do not parse replies, and for refusals, which have none."""
    pairs = [("guard-decision", str(outcome.decision))]
    if outcome.reason is not None:
        pairs.append(("guard-reason", str(outcome.reason)))
    if outcome.scores is not None and outcome.threshold is not None:
        pairs += [("guard-score", f"{outcome.scores.max():.6g}"), ("guard-threshold", f"{outcome.threshold:.6g}")]
    return tuple(pairs)
