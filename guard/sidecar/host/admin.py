"""The admin service, `guard.v1.Sidecar`: status of a sidecar, its models, and flagged images as they are recorded.

It is for operators. What it tells would help an attacker who is a client of the inference port, so it has a port of its
own.
"""

import asyncio
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from guard.evidence import Record
from guard.evidence.records import clean
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.addresses import socket_path
from guard.sidecar.host.health import Health
from guard.sidecar.host.reporting import Reporter, told
from guard.sidecar.inference.calls import Context
from guard.sidecar.policy import Decision
from guard.sidecar.settings import Settings
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


class AdminServer:
    """Serves `guard.v1.Sidecar`, with health and reflection, while the context is open.

    Over TCP it uses the TLS files of the inference port, if there are any, including the certificate authorities of
    clients. A Unix socket has the file mode that the settings name.

    Args:
        reporter: Reports what the sidecar is.
        settings: Settings of the sidecar, which name an admin address.
        process: The number of this process if there are several; None if it is the only one.
        health: Health of the sidecar.

    Attributes:
        address: The address with the actual port.

    Raises:
        UsageError: The address is taken or not of this machine, or a certificate cannot be used.
    """

    def __init__(self, reporter: Reporter, settings: Settings, process: int | None, health: Health) -> None:
        self._recorder = reporter.recorder
        self._server = grpc.aio.server(maximum_concurrent_rpcs=_MAX_CALLS, options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_Service(reporter).handlers(),))
        _add_health_and_reflection(self._server, health)
        address = settings.admin_addresses[process or 0]
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
        self._recorder.end_followers()
        await self._server.stop(_GRACE_SECONDS)


def _add_health_and_reflection(server: grpc.aio.Server, state: Health) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


class _Service:
    """The methods of the service."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
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
                "GetConfiguration": grpc.unary_unary_rpc_method_handler(
                    self._get_configuration,
                    messages.GetConfigurationRequest.FromString,
                    messages.Configuration.SerializeToString,
                ),
            },
        )

    async def _get_status(self, _request: messages.GetStatusRequest, _context: Context) -> messages.Status:
        return self._reporter.status()

    async def _list_models(self, request: messages.ListModelsRequest, _context: Context) -> messages.ListModelsResponse:
        # Reading the alarms may wait for a disk, and requests must not wait for that.
        return await asyncio.to_thread(self._reporter.models, with_pictures=request.include_pictures)

    async def _get_configuration(
        self, _request: messages.GetConfigurationRequest, _context: Context
    ) -> messages.Configuration:
        return self._reporter.configuration()

    async def _follow_evidence(self, request: messages.FollowEvidenceRequest, context: Context) -> None:
        known, recorder = self._reporter.labels, self._reporter.recorder
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
            with recorder.followed(wants) as follower:
                await context.send_initial_metadata(())
                pictured = request.include_thumbnails
                async for each in told(recorder, follower, wants, recent=request.recent, with_thumbnails=pictured):
                    await context.write(each)
        finally:
            self._followers -= 1
