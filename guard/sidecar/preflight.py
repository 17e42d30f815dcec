"""What must hold before a sidecar serves; `guard serve --check` looks at all of it and serves nothing."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import grpc
from google.protobuf.message import DecodeError

from guard import profiles
from guard.classifiers import ExportedClassifier
from guard.errors import GuardError, ProfileError, UsageError
from guard.evidence import EVIDENCE_FILE, EvidenceLog
from guard.profiles import Profile
from guard.sidecar.addresses import check_free
from guard.sidecar.inference_pb2 import ServerReadyRequest, ServerReadyResponse
from guard.sidecar.loops import loop_factory
from guard.sidecar.service import SERVICE
from guard.sidecar.settings import Settings
from guard.sidecar.tls import name_options, server_certificates, upstream_credentials

UPSTREAM_SECONDS = 3.0


class Status(StrEnum):
    """Of one finding."""

    OK = "ok"
    WARNING = "warning"
    """It does not keep a sidecar from starting."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """What was looked at, and how it is.

    Attributes:
        subject: What was looked at.
        status: How it is.
        detail: In words.
        exit_code: That a start would end with for this, 0 unless it failed.
    """

    subject: str
    status: Status
    detail: str
    exit_code: int = 0


def load(settings: Settings) -> tuple[Profile, ExportedClassifier | None]:
    """The profile, and the exported model if there is one; they are of the same classifier.

    Raises:
        ProfileError: The profile is missing, damaged, or of another model.
        ModelError: The exported model is missing or damaged.
    """
    profile = profiles.read(settings.profile)
    model = ExportedClassifier(settings.model) if settings.model else None
    if model is not None:
        _match(profile, model, settings)
    return profile, model


def _match(profile: Profile, model: ExportedClassifier, settings: Settings) -> None:
    if model.digest != profile.document.model.digest:
        raise ProfileError(
            f"the profile {settings.profile} is of another model than {settings.model}: vet and calibrate the model "
            "that was exported, or export the one that was vetted"
        )


def preflight(settings: Settings) -> tuple[Finding, ...]:
    """Look at everything that a start needs, past the first failure; nothing is written or served.

    Whether the upstream server answers is a warning at most: a sidecar starts before it.
    """
    checks = _Checks(settings)
    found = (
        _look(subject, check)
        for subject, check in (
            ("profile", checks.profile),
            ("calibration", checks.calibration),
            ("model", checks.model),
            ("digest", checks.digest),
            ("loop", checks.loop),
            ("tls", checks.tls),
            ("listen", checks.listen),
            ("metrics", checks.metrics),
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


class _Checks:
    """Each method looks at one thing: it says how it is, None if there is nothing to look at, or raises."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._profile: Profile | None = None
        self._model: ExportedClassifier | None = None

    def profile(self) -> str:
        self._profile = profiles.read(self._settings.profile)
        outcome = self._profile.document.vetting.verdict.outcome
        if outcome == "backdoored":
            raise _DoubtError("the model is vetted as backdoored; repair it, screening is for the time until then")
        return f"verdict: {outcome}"

    def calibration(self) -> str | None:
        if self._profile is None:
            return None
        return f"alpha {self._profile.detector(self._settings.neighbours).alpha:g}"

    def model(self) -> str | None:
        if self._settings.model is None:
            return None
        self._model = ExportedClassifier(self._settings.model)
        return self._model.digest

    def digest(self) -> str | None:
        if self._profile is None or self._model is None:
            return None
        _match(self._profile, self._model, self._settings)
        return "the profile is of this model"

    def loop(self) -> str:
        return "asyncio" if loop_factory(self._settings.loop) is None else "uvloop"

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

    def state(self) -> str | None:
        folder = self._settings.state
        if folder is None:
            return None
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {folder}")
        if not (folder / EVIDENCE_FILE).exists():
            return f"{folder} can be written"
        return f"{folder} holds {EvidenceLog(folder / EVIDENCE_FILE).count()} records"

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
