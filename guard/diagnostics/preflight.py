"""A rehearsal of a start: `guard serve --check` constructs what `guard serve` constructs, and serves nothing."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from guard._cpus import usable_cpus
from guard.certificates import CERTIFICATE_FILE, files_of_model, files_of_profile, verify
from guard.certificates.policy import read_policies
from guard.classifiers import ExportedClassifier
from guard.diagnostics.findings import Finding, Status
from guard.errors import DamagedLogError, GuardError, ProfileError, StateError
from guard.evidence import EVIDENCE_FILE
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ServerReadyRequest, ServerReadyResponse
from guard.sidecar.decisions.checking import Checker
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.loading import (
    Loaded,
    has_reference_model,
    make_detector,
    match,
    read_opinions,
    read_profile,
)
from guard.sidecar.decisions.state import check_unused
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.host.dashboard import Access
from guard.sidecar.host.limits import most_memory, resident_bytes
from guard.sidecar.inference.proxy import upstream_endpoint
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import FailurePolicy
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics
from guard.sidecar.transport.channels import open_channel
from guard.sidecar.transport.loops import loop_factory
from guard.sidecar.transport.ports import check_free
from guard.sidecar.transport.tls import server_certificates

if TYPE_CHECKING:
    from guard.profiles import Profile
    from guard.screening import Detector
    from guard.sidecar.decisions.opinions import SecondOpinions

UPSTREAM_SECONDS = 3.0
_BEGUN_ANEW = "a start moves it aside and begins anew"


def preflight(settings: Settings) -> tuple[Finding, ...]:
    """Construct everything that a start constructs, past the first failure; nothing is written, bound or served.

    The checks have the order of a start, so that the first failure is the one that a start would end with. An upstream
    server that does not answer is only a warning: a sidecar may start before it.
    """
    checks = _Checks(settings)
    return tuple(
        finding
        for subject, check in (
            ("loop", checks.loop),
            ("lock", checks.lock),
            ("state", checks.state),
            *(
                (f"{subject} {each.settings.label}" if settings.models else subject, check)
                for each in (_ModelChecks(own, checks) for own in settings.served)
                for subject, check in each.all()
            ),
            ("memory", checks.memory),
            ("threads", checks.processors),
            ("upstream", checks.upstream),
            ("tls", checks.tls),
            ("metrics", checks.metrics),
            ("admin", checks.admin),
            ("dashboard", checks.dashboard),
            ("listen", checks.listen),
        )
        if (finding := _look(subject, check)) is not None
    )


class _DoubtError(Exception):
    """Something is not as it should be, but does not keep a sidecar from starting."""


def _look(subject: str, check: Callable[[], str | None]) -> Finding | None:
    """The finding of one check; None if there is nothing to look at."""
    try:
        detail = check()
    except _DoubtError as doubt:
        return Finding(subject, Status.WARNING, str(doubt))
    except GuardError as error:
        return Finding(subject, Status.FAILED, str(error), error.exit_code)
    return None if detail is None else Finding(subject, Status.OK, detail)


class _Checks:
    """The checks of a sidecar: each says what it found, returns None if there is nothing to look at, or raises."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._recorder: Recorder | None = None
        self.sidecar_metrics = Metrics()

    @cached_property
    def shared(self) -> tuple[Shared, ...]:
        """What the models have in common, in each process; empty if the folder for state cannot be used."""
        if self._recorder is None:
            return ()
        workers = Workers(self.settings.workers, self.settings.max_queued)
        several = self.settings.processes > 1
        return tuple(
            Shared(self.settings, workers, self._recorder, process if several else None, read_only=True)
            for process in range(self.settings.processes)
        )

    @property
    def threads(self) -> int:
        """Threads that one forward pass uses."""
        return self.settings.forward_threads

    @property
    def embedded(self) -> bool:
        """Whether guard serves the models itself."""
        return self.settings.upstream is None

    def loop(self) -> str:
        return "asyncio" if loop_factory(self.settings.event_loop) is None else "uvloop"

    def state(self) -> str | None:
        folder = self.settings.state_dir
        recorder = Recorder(self.settings.model_copy(update={"state_dir": None}), self.sidecar_metrics)
        if folder is not None:
            try:
                Recorder(self.settings, self.sidecar_metrics, read_only=True)
            except DamagedLogError as error:
                self._recorder = recorder
                raise _DoubtError(f"{error}; {_BEGUN_ANEW}") from error
        self._recorder = recorder
        if folder is None:
            return None
        log = "with the evidence log in it" if (folder / EVIDENCE_FILE).exists() else "without an evidence log yet"
        return f"{folder} can be written, {log}"

    def lock(self) -> str | None:
        folder = self.settings.state_dir
        if folder is None:
            return None
        check_unused(folder)
        return f"no sidecar uses {folder}"

    def tls(self) -> str | None:
        settings = self.settings
        if server_certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca) is None:
            return None
        who = "clients need a certificate" if settings.tls_client_ca else "clients need no certificate"
        return f"{settings.tls_certificate}; {who}"

    def memory(self) -> str:
        """The bound that follows from the settings; the models are in memory by now."""
        most = most_memory(self.settings, resident_bytes())
        return (
            f"at most {most / 2**20:,.0f} MiB in each process, besides what the models, and the reference models for "
            f"second opinions, take for forward passes of {self.settings.max_batch} images"
        )

    def processors(self) -> str:
        """The threads of forward passes, against the processors that a container leaves this process."""
        threads, processes, usable = self.settings.forward_threads, self.settings.processes, usable_cpus()
        text = f"a forward pass uses {threads} of {usable} usable processors"
        if processes > 1:
            text = f"forward passes of {processes} processes use {threads} threads each, of {usable} usable processors"
        if threads * processes > max(usable, processes):
            raise _DoubtError(
                f"{text}; more threads than processors, by affinity and the quota of the container, make each wait for "
                "the others; lower --threads"
            )
        return text

    def listen(self) -> str:
        check_free(self.settings.listen)
        return f"{self.settings.listen} is free"

    def metrics(self) -> str:
        check_free(self.settings.metrics)
        return f"{self.settings.metrics} is free"

    def admin(self) -> str | None:
        for address in self.settings.admin_addresses:
            check_free(address)
        return None if self.settings.admin is None else f"{', '.join(self.settings.admin_addresses)} is free"

    def dashboard(self) -> str | None:
        if self.settings.dashboard is None:
            return None
        check_free(self.settings.dashboard)
        Access.of(self.settings)
        return f"{self.settings.dashboard} is free"

    def upstream(self) -> str | None:
        address = self.settings.upstream
        if address is None:
            return None
        with open_channel(upstream_endpoint(self.settings)) as channel:
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


class _ModelChecks:
    """The checks of one model, in the order of a start."""

    def __init__(self, settings: ModelSettings, sidecar: _Checks) -> None:
        self.settings, self._sidecar = settings, sidecar
        self._profile: Profile | None = None
        self._model: ExportedClassifier | None = None
        self._detector: Detector | None = None
        self._opinions: SecondOpinions | None = None
        self._belongs = settings.model is None

    def all(self) -> tuple[tuple[str, Callable[[], str | None]], ...]:
        """The checks by subject, in their order."""
        return (
            ("profile", self.profile),
            ("model", self.model),
            ("digest", self.digest),
            ("reference", self.reference),
            ("certificate", self.certificate),
            ("calibration", self.calibration),
            ("screening", self.screening),
        )

    def profile(self) -> str:
        self._profile = read_profile(self.settings)
        outcome = self._profile.document.vetting.verdict.outcome
        if not self.settings.clears(outcome):
            found = f'require_vetted: the verdict on the model is "{outcome}", not "no evidence"'
            if self.settings.on_failure is FailurePolicy.CLOSED:
                raise ProfileError(f"{found}; every request would be refused")
            raise _DoubtError(f"{found}; no request will pass")
        if outcome == "backdoored":
            raise _DoubtError("verdict: backdoored; screening protects only until the model is replaced")
        return f"verdict: {outcome}"

    def model(self) -> str | None:
        if self.settings.model is None:
            return None
        self._model = ExportedClassifier(self.settings.model, threads=self._sidecar.threads)
        return self._model.digest

    def digest(self) -> str | None:
        if self._profile is None or self._model is None:
            return None
        match(self._profile, self._model, self.settings)
        self._belongs = True
        return "the profile was made for this model"

    def reference(self) -> str | None:
        """Whether the profile has a reference model, and whether it is in use."""
        if self._profile is None:
            return None
        self._opinions = read_opinions(self._profile, self.settings, threads=self._sidecar.threads)
        calibration = self._profile.document.calibration
        record = None if calibration is None else calibration.second_opinion
        if record is None or not has_reference_model(self._profile):
            return "off: the profile has no reference model"
        about = (
            f"reference model {record.source} ({record.kind}), same answer to {record.agreement:.0%} of clean images"
        )
        if self._opinions is None:
            return f"off, though the profile has a {about}"
        rule = self._opinions.rule
        who = {"all": "all requests", "near": "requests near the threshold"}.get(rule, f"a share of {rule} of requests")
        return f"{who}; {about}"

    def certificate(self) -> str | None:
        """Whether the trust policies accept the certificate of the model."""
        own, profile = self._sidecar.settings, self.settings.profile
        if self._profile is None or profile is None:
            return None
        policies = read_policies(own.policy, own.trust)
        if not policies:
            return "not checked: the settings name neither trust nor policy"
        files = files_of_profile(profile) | (files_of_model(self.settings.model) if self.settings.model else {})
        admission = verify(profile / CERTIFICATE_FILE, files, policies, str(self.settings.model or profile))
        if own.require_certified and self.settings.on_failure is FailurePolicy.CLOSED:
            admission.demand()
        if not admission.admitted:
            raise _DoubtError(str(admission))
        return str(admission)

    def calibration(self) -> str | None:
        if self._profile is None:
            return None
        self._detector = make_detector(self._profile, self.settings, self._opinions)
        return f"alpha {self._detector.alpha:g}"

    def screening(self) -> str | None:
        """Whether detector and stream monitor can be put to work, with the monitor's state in each process."""
        if self._profile is None or self._detector is None or not self._belongs or not self._sidecar.shared:
            return None
        metrics = self._sidecar.sidecar_metrics.of(self.settings)
        loaded = Loaded(self._profile, self._detector, self._model, self._opinions)
        for shared in self._sidecar.shared:
            try:
                Checker(loaded, self.settings, metrics, shared, None)
            except StateError as error:
                raise _DoubtError(f"{error}; {_BEGUN_ANEW}") from error
        return "the detector and the stream monitor can be started"
