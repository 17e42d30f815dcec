"""Requests, and the routes that say how they are screened."""

from dataclasses import dataclass

from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar.decisions.checking import Checker
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Outcome, refusal
from guard.sidecar.telemetry.metrics import ModelMetrics


@dataclass(frozen=True, eq=False)
class Route:
    """How the requests of one model are screened, as long as its profile stays the same.

    Attributes:
        settings: Settings of the model.
        metrics: Metrics of the model.
        checker: Screens the requests; None for models that guard has no profile of.
    """

    settings: ModelSettings
    metrics: ModelMetrics
    checker: Checker | None

    @property
    def embeds(self) -> bool:
        """Whether guard embeds the images itself."""
        return self.checker is not None and self.settings.embedding_output is None

    @property
    def barred(self) -> Outcome | None:
        """The outcome of every request if the model is such that none is served; None otherwise."""
        if self.checker is None or self.checker.barred is None:
            return None
        outcome = Outcome.unchecked(self.checker.barred)
        return outcome if refusal(outcome, self.settings.mode, self.settings.on_failure) else None


@dataclass
class Request:
    """One inference request.

    Attributes:
        message: The parsed request.
        data: The serialised request, as it is forwarded unless its images are replaced.
        route: How it is screened. The route is found by the name and version in the request, and corrected by the
            version in the reply if the request names none. It stays the same if the profile is replaced meanwhile.
        trace_id: The id of the trace that the request belongs to, or "".
        upstream_seconds: Seconds that the upstream server took for it; None if it was not asked.
    """

    message: ModelInferRequest
    data: bytes
    route: Route
    trace_id: str = ""
    upstream_seconds: float | None = None
