"""What must hold before a sidecar serves; `guard serve --check` looks at all of it and serves nothing."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from guard import evidence
from guard.classifiers import ExportedClassifier
from guard.diagnostics.findings import Finding, Status
from guard.errors import GuardError, ProfileError, UsageError
from guard.evidence import EVIDENCE_FILE
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ServerReadyRequest, ServerReadyResponse
from guard.sidecar.decisions.loading import match, read_profile
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import FailurePolicy
from guard.sidecar.settings import Settings
from guard.sidecar.transport.addresses import check_free
from guard.sidecar.transport.loops import loop_factory
from guard.sidecar.transport.tls import name_options, server_certificates, upstream_credentials

if TYPE_CHECKING:
    from guard.profiles import Profile

UPSTREAM_SECONDS = 3.0


def preflight(settings: Settings) -> tuple[Finding, ...]:
    """Look at everything that a start needs, past the first failure; nothing is written or served.

    Whether the upstream server answers is a warning at most: a sidecar starts before it.
    """
    checks = _Checks(settings)
    of_models = [
        (f"{subject} {each.label}" if settings.models else subject, check)
        for each in settings.served
        for subject, check in _ModelChecks(each).all()
    ]
    found = (
        _look(subject, check)
        for subject, check in (
            *of_models,
            ("loop", checks.loop),
            ("tls", checks.tls),
            ("listen", checks.listen),
            ("metrics", checks.metrics),
            ("admin", checks.admin),
            ("state", checks.state),
            ("upstream", checks.upstream),
        )
    )
    return tuple(finding for finding in found if finding is not None)


class _DoubtError(Exception):
    """Something is not as it should be, and does not keep a sidecar from starting."""


def _look(subject: str, check: Callable[[], str | None]) -> Finding | None:
    """The finding of one check; None if there was nothing to look at."""
    try:
        detail = check()
    except _DoubtError as doubt:
        return Finding(subject, Status.WARNING, str(doubt))
    except GuardError as error:
        return Finding(subject, Status.FAILED, str(error), error.exit_code)
    return None if detail is None else Finding(subject, Status.OK, detail)


class _ModelChecks:
    """Each method looks at one thing: it says how it is, None if there is nothing to look at, or raises."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._profile: Profile | None = None
        self._model: ExportedClassifier | None = None

    def all(self) -> tuple[tuple[str, Callable[[], str | None]], ...]:
        """The checks, in their order."""
        return (
            ("profile", self.profile),
            ("calibration", self.calibration),
            ("model", self.model),
            ("digest", self.digest),
        )

    def profile(self) -> str:
        self._profile = read_profile(self._settings)
        outcome = self._profile.document.vetting.verdict.outcome
        if not self._settings.clears(outcome):
            found = f'require_vetted: the verdict on the model is "{outcome}", not "no evidence"'
            if self._settings.on_failure is FailurePolicy.CLOSED:
                raise ProfileError(f"{found}; every request would be refused")
            raise _DoubtError(f"{found}; no request will pass")
        if outcome == "backdoored":
            raise _DoubtError("the model is vetted as backdoored; repair it, screening is for the time until then")
        return f"verdict: {outcome}"

    def calibration(self) -> str | None:
        if self._profile is None:
            return None
        return f"alpha {self._profile.detector(self._settings.neighbours, self._settings.alpha).alpha:g}"

    def model(self) -> str | None:
        if self._settings.model is None:
            return None
        self._model = ExportedClassifier(self._settings.model)
        return self._model.digest

    def digest(self) -> str | None:
        if self._profile is None or self._model is None:
            return None
        match(self._profile, self._model, self._settings)
        return "the profile is of this model"


class _Checks:
    """The same, of what is not of one model."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def loop(self) -> str:
        return "asyncio" if loop_factory(self._settings.event_loop) is None else "uvloop"

    def tls(self) -> str | None:
        if server_certificates(self._settings) is None:
            return None
        who = "clients need a certificate" if self._settings.tls_client_ca else "clients need no certificate"
        return f"{self._settings.tls_certificate}; {who}"

    def listen(self) -> str:
        check_free(self._settings.listen)
        return f"{self._settings.listen} is free"

    def metrics(self) -> str:
        check_free(self._settings.metrics)
        return f"{self._settings.metrics} is free"

    def admin(self) -> str | None:
        for address in self._settings.admin_addresses:
            check_free(address)
        return None if self._settings.admin is None else f"{', '.join(self._settings.admin_addresses)} is free"

    def state(self) -> str | None:
        folder = self._settings.state_dir
        if folder is None:
            return None
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {folder}")
        if not (folder / EVIDENCE_FILE).exists():
            return f"{folder} can be written"
        return f"{folder} holds {evidence.EvidenceLog(folder / EVIDENCE_FILE).count()} records"

    def upstream(self) -> str | None:
        address = self._settings.upstream
        if address is None:
            return None
        credentials = upstream_credentials(self._settings)
        channel = (
            grpc.insecure_channel(address)
            if credentials is None
            else grpc.secure_channel(address, credentials, name_options(self._settings))
        )
        with channel:
            ask = channel.unary_unary(f"/{SERVICE}/ServerReady")
            try:
                reply = ask(ServerReadyRequest().SerializeToString(), timeout=UPSTREAM_SECONDS)
                ready = ServerReadyResponse.FromString(reply).ready
            except grpc.RpcError as error:
                raise _DoubtError(f"{address} does not answer: {error.code().name}, {error.details()}") from error
            except DecodeError as error:
                raise _DoubtError(f"{address} answers, but not by the Open Inference Protocol") from error
        if not ready:
            raise _DoubtError(f"{address} answers that it is not ready")
        return f"{address} is ready"
