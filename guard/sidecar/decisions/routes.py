"""What a request is, and what holds for it."""

from dataclasses import dataclass

from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar.decisions.checking import Checker
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Outcome, Reason, refusal
from guard.sidecar.telemetry.metrics import ModelMetrics


@dataclass(frozen=True, eq=False)
class Route:
    """What holds for the requests of one model, as long as its profile stays the same.

    Attributes:
        settings: Of the model.
        metrics: Of the model.
        checker: Screens its requests; None for models that guard has no profile of.
    """

    settings: ModelSettings
    metrics: ModelMetrics
    checker: Checker | None

    @property
    def embeds(self) -> bool:
        """Whether guard embeds the images itself."""
        return self.checker is not None and self.settings.embedding_output is None

    @property
    def unvetted(self) -> Outcome | None:
        """The outcome of every request, where the verdict on the model is such that none is served."""
        if self.checker is None or self.checker.vetted:
            return None
        outcome = Outcome.unchecked(Reason.MODEL_NOT_VETTED)
        return outcome if refusal(outcome, self.settings.mode, self.settings.on_failure) else None


@dataclass
class Request:
    """One inference request.

    Attributes:
        message: As it came.
        route: What holds for it: found by name and version, and settled by the reply's version where it names none. It
            stays the same when the profile is replaced meanwhile.
        trace_id: Of the trace that it belongs to, or "".
    """

    message: ModelInferRequest
    route: Route
    trace_id: str = ""
