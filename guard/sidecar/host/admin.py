"""The admin service, `guard.v1.Sidecar`: status of a sidecar, its models, and flagged images as they are recorded.

It is for operators. What it tells would help an attacker who is a client of the inference port, so it has a port of its
own.
"""

import asyncio
import math
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from guard import __version__
from guard.evidence import Record
from guard.evidence.records import clean
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.addresses import socket_path
from guard.sidecar.decisions.models import Models, Served
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.host.health import Health
from guard.sidecar.inference.calls import Context
from guard.sidecar.policy import Decision, FailurePolicy, Mode
from guard.sidecar.telemetry.metrics import Metrics
from guard.sidecar.transport.ports import open_port
from guard.sidecar.transport.tls import server_certificates

SERVICE = messages.DESCRIPTOR.services_by_name["Sidecar"].full_name
MAX_FOLLOWERS = 16
"""The most calls of `FollowEvidence` at a time; further ones are refused with RESOURCE_EXHAUSTED."""
_MAX_CALLS = 64
"""The most calls of all methods at a time."""
_LONGEST_REQUEST = 2**16
_GRACE_SECONDS = 1.0
"""Seconds that followers are given at the end to read the records that wait for them."""
_OPTIONS = (
    ("grpc.max_receive_message_length", _LONGEST_REQUEST),
    ("grpc.so_reuseport", 0),
    # A follower whose machine has vanished must not occupy a place for ever.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

_MODES = MappingProxyType(
    {Mode.SHADOW: messages.MODE_SHADOW, Mode.TAG: messages.MODE_TAG, Mode.BLOCK: messages.MODE_BLOCK}
)
_POLICIES = MappingProxyType(
    {
        FailurePolicy.OPEN: messages.FAILURE_POLICY_OPEN,
        FailurePolicy.CLOSED: messages.FAILURE_POLICY_CLOSED,
    }
)
_OUTCOMES = MappingProxyType(
    {
        "backdoored": messages.Verdict.OUTCOME_BACKDOORED,
        "no evidence": messages.Verdict.OUTCOME_NO_EVIDENCE,
        "inconclusive": messages.Verdict.OUTCOME_INCONCLUSIVE,
    }
)
_KINDS = MappingProxyType({"attack": messages.Alarm.KIND_ATTACK, "drift": messages.Alarm.KIND_DRIFT})
_DECISIONS = MappingProxyType(
    {Decision.PASS: messages.Evidence.DECISION_PASS, Decision.FLAG: messages.Evidence.DECISION_FLAG}
)


class AdminServer:
    """Serves `guard.v1.Sidecar`, with health and reflection, while the context is open.

    Over TCP it uses the TLS files of the inference port, if there are any, including the certificate authorities of
    clients. A Unix socket has the file mode that the settings name.

    Args:
        shared: What the models share, with settings that name an admin address.
        models: The models that are served.
        health: Health of the sidecar.
        metrics: Metrics of the sidecar.

    Attributes:
        address: The address with the actual port.

    Raises:
        UsageError: The address is taken or not of this machine, or a certificate cannot be used.
    """

    def __init__(self, shared: Shared, models: Models, health: Health, metrics: Metrics) -> None:
        self._evidence = shared.evidence
        self._server = grpc.aio.server(maximum_concurrent_rpcs=_MAX_CALLS, options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_Service(shared, models, health, metrics).handlers(),))
        _add_health_and_reflection(self._server, health)
        settings = shared.settings
        address = settings.admin_addresses[shared.process or 0]
        # The port has certificates of its own, since `Certificates` hands each renewal out once.
        certificates = None
        if socket_path(address) is None:
            certificates = server_certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        self.address = open_port(self._server, address, certificates, socket_mode=settings.socket_mode)

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._evidence.end_followers()
        await self._server.stop(_GRACE_SECONDS)


def _add_health_and_reflection(server: grpc.aio.Server, state: Health) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


class _Service:
    """The methods of the service."""

    def __init__(self, shared: Shared, models: Models, health: Health, metrics: Metrics) -> None:
        self._shared, self._models, self._health, self._metrics = shared, models, health, metrics
        self._started = datetime.now(UTC)
        self._followers = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        """The gRPC handlers of the methods."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetStatus": grpc.unary_unary_rpc_method_handler(
                    self._get_status, messages.GetStatusRequest.FromString, messages.Status.SerializeToString
                ),
                "ListModels": grpc.unary_unary_rpc_method_handler(
                    self._list_models,
                    messages.ListModelsRequest.FromString,
                    messages.ListModelsResponse.SerializeToString,
                ),
                "FollowEvidence": grpc.unary_stream_rpc_method_handler(
                    self._follow_evidence,
                    messages.FollowEvidenceRequest.FromString,
                    messages.Evidence.SerializeToString,
                ),
            },
        )

    async def _get_status(self, _request: messages.GetStatusRequest, _context: Context) -> messages.Status:
        reason, trouble = self._health.reason, self._shared.evidence.trouble
        (active,) = self._metrics.active.collect()
        return messages.Status(
            version=__version__,
            process=self._shared.process,
            started_at=self._started,
            ready=reason is None,
            reason=reason or "",
            upstream=self._shared.settings.upstream or "",
            active_requests=int(active.samples[0].value),
            evidence_trouble=trouble or "",
        )

    async def _list_models(
        self, _request: messages.ListModelsRequest, _context: Context
    ) -> messages.ListModelsResponse:
        # Reading the alarms may wait for a disk, and requests must not wait for that.
        described = await asyncio.to_thread(lambda: [_model(served) for served in self._models.served])
        return messages.ListModelsResponse(models=described)

    async def _follow_evidence(self, request: messages.FollowEvidenceRequest, context: Context) -> None:
        known = {clean(served.settings.label) for served in self._models.served}
        wanted = {clean(label) for label in request.models} or known
        if unknown := sorted(wanted - known):
            message = f"guard: there is no model {unknown[0]!r} here; ListModels has the labels of those that there are"
            await context.abort(grpc.StatusCode.NOT_FOUND, message)
        if self._followers >= MAX_FOLLOWERS:
            message = f"guard: {MAX_FOLLOWERS} calls follow the evidence, and no more are taken; try again later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)

        def wants(record: Record) -> bool:
            return record.model in wanted and (request.include_withdrawn or record.decision == Decision.FLAG)

        self._followers += 1
        try:
            with self._shared.evidence.followed(wants) as follower:
                await context.send_initial_metadata(())
                while (found := await follower.next()) is not None:
                    record, lost = found
                    await context.write(_evidence(record, lost, with_thumbnail=request.include_thumbnails))
        finally:
            self._followers -= 1


def _model(served: Served) -> messages.Model:
    # Read once, since the checker is replaced when the profile changes.
    checker, settings = served.checker, served.settings
    document = checker.profile.document
    verdict, calibration = document.vetting.verdict, document.calibration
    model = messages.Model(
        name=settings.model_name,
        version=served.version,
        label=settings.label,
        digest=document.model.digest,
        verdict=messages.Verdict(
            outcome=_OUTCOMES[verdict.outcome],
            target_class="" if verdict.target is None else checker.profile.class_name(verdict.target),
            p_value=verdict.p_value if math.isfinite(verdict.p_value) else None,
        ),
        mode=_MODES[settings.mode],
        failure_policy=_POLICIES[settings.on_failure],
        alpha=checker.alpha,
        threshold=checker.watch.threshold,
        triggers=[
            messages.Trigger(id=each.id, family=each.family, target_class=checker.profile.class_name(each.target))
            for each in document.triggers
        ],
        alarms=[messages.Alarm(kind=_KINDS[alarm.kind], stream=alarm.stream) for alarm in checker.watch.alarms],
        loaded_at=served.since,
        stale=served.stale,
    )
    if calibration is not None:
        model.reference_size = calibration.reference
        model.calibration.images = calibration.threshold.size
        model.calibration.held_out_images = calibration.held_out
        model.calibration.held_out_false_alarms = calibration.false_alarms
        if checker.opinions is not None and (opinion := calibration.second_opinion) is not None:
            model.second_opinion.requests = checker.opinions.rule
            model.second_opinion.kind, model.second_opinion.digest = opinion.kind, opinion.digest
            model.second_opinion.agreement = opinion.agreement
    return model


def _evidence(record: Record, lost: int, *, with_thumbnail: bool) -> messages.Evidence:
    return messages.Evidence(
        lost=lost,
        time=datetime.fromisoformat(record.time),
        request_id=record.request_id,
        trace_id=record.trace_id,
        model=record.model,
        model_digest=record.model_digest,
        image=record.image,
        decision=_DECISIONS[Decision(record.decision)],
        mode=_MODES[Mode(record.mode)],
        predicted_class=record.predicted,
        p_value=record.p_value,
        alpha=record.alpha,
        scores=record.scores,
        thresholds=record.thresholds,
        trigger=record.trigger,
        target_class=record.target,
        second_look=record.second_look,
        explanation=record.explanation,
        input_digest=record.input_digest,
        thumbnail=record.thumbnail if with_thumbnail else None,
        decided_by=record.decided_by,
        reference_class=record.reference,
    )
