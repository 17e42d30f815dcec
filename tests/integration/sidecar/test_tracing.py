"""Spans of requests: what OpenTelemetry's SDK records, what the upstream server is told, and what a collector gets."""

import sys
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from queue import Queue
from typing import Any, Self

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from guard.evidence import EVIDENCE_FILE, EvidenceLog
from guard.protocol import SERVICE
from guard.sidecar import Settings
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.host.limits import Bounds, Limited
from guard.sidecar.inference.embedded import EmbeddedService
from guard.sidecar.inference.screener import Screener
from guard.sidecar.inference.upstream import UpstreamService
from guard.sidecar.telemetry import tracing
from guard.sidecar.telemetry.metrics import Metrics
from tests.integration.sidecar.conftest import WAIT_SECONDS, Fault, Floats, Launcher, Upstream, connected, infer_request

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
INFER = f"{SERVICE}/ModelInfer"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", lambda: provider.get_tracer("guard"))
    return exporter


@asynccontextmanager
async def served(**values: Any) -> AsyncIterator[grpc.aio.Channel]:
    """The inference service in this process, where the exporter is."""
    settings, metrics = Settings.load(None, **values), Metrics()
    shared = Shared(settings, Workers(1, 8), Recorder(settings, metrics))
    async with AsyncExitStack() as stack:
        stack.callback(shared.close)
        stack.callback(shared.workers.close)
        screener = Screener(settings, Models(shared, metrics), metrics)
        service = (EmbeddedService if settings.upstream is None else UpstreamService)(screener)
        stack.push_async_callback(service.close)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Limited(service.handlers(), Bounds.of(settings), metrics),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 1)
        yield await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))


async def ask(channel: grpc.aio.Channel, images: Floats, **more: Any) -> grpc.StatusCode:
    call = channel.unary_unary(f"/{INFER}")(infer_request(images, **more).SerializeToString(), metadata=TRACED)
    code: grpc.StatusCode = await call.code()
    return code


def by_kind(exporter: InMemorySpanExporter) -> dict[SpanKind, ReadableSpan]:
    spans = exporter.get_finished_spans()
    assert len({span.kind for span in spans}) == len(spans)
    return {span.kind: span for span in spans}


def own(span: ReadableSpan) -> Mapping[str, Any]:
    return {name: value for name, value in (span.attributes or {}).items() if name.startswith("guard.")}


async def test_a_flag_is_told_with_what_decided_and_what_was_done(
    exporter: InMemorySpanExporter, exported: Path, served_profile: Path, triggered: Floats, tmp_path: Path
) -> None:
    values = {"model": exported, "profile": served_profile, "state_dir": tmp_path}
    async with served(mode="block", **values) as channel:
        assert await ask(channel, triggered[:3]) is grpc.StatusCode.PERMISSION_DENIED
    (span,) = exporter.get_finished_spans()
    assert (span.kind, span.name) == (SpanKind.SERVER, INFER)
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    found = own(span)
    assert (found["guard.decision"], found["guard.enforced"], found["guard.mode"]) == ("flag", "refused", "block")
    assert (found["guard.images"], found["guard.trigger"], found["guard.decided_by"]) == (3, "patch-1", "match patch-1")
    assert 0 < found["guard.p_value"] <= found["guard.alpha"]
    assert (span.attributes or {})["rpc.response.status_code"] == "PERMISSION_DENIED"
    assert span.status.status_code is StatusCode.UNSET  # the server did what it should
    assert next(EvidenceLog(tmp_path / EVIDENCE_FILE).records()).trace_id == TRACE


async def test_the_hop_to_the_upstream_server_is_a_child_and_leads_the_trace_there(
    exporter: InMemorySpanExporter, exported: Path, served_profile: Path, upstream: Upstream, clean: Floats
) -> None:
    values = {"model": exported, "profile": served_profile, "upstream": upstream.address}
    async with served(**values) as channel:
        assert await ask(channel, clean[:1]) is grpc.StatusCode.OK
        upstream.fault = Fault(grpc.StatusCode.UNAVAILABLE, "busy")
        assert await ask(channel, clean[:1]) is grpc.StatusCode.UNAVAILABLE
    hop, answered, failed_hop, failed = exporter.get_finished_spans()
    assert hop.context is not None
    assert hop.parent == answered.context
    assert (hop.kind, answered.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    told = dict(upstream.inferences()[0].metadata)
    assert told["traceparent"] == f"00-{TRACE}-{hop.context.span_id:016x}-01"
    assert (hop.attributes or {})["server.address"] == "127.0.0.1"
    assert own(answered)["guard.enforced"] == "annotated"
    assert failed_hop.status.status_code is failed.status.status_code is StatusCode.ERROR
    assert own(failed)["guard.reason"] == "upstream_failed"


async def test_a_check_that_no_reply_waits_for_has_a_span_of_its_own(
    exporter: InMemorySpanExporter, exported: Path, served_profile: Path, upstream: Upstream, triggered: Floats
) -> None:
    values = {"model": exported, "profile": served_profile, "upstream": upstream.address}
    async with served(mode="shadow", failure_policy="open", **values) as channel:
        assert await ask(channel, triggered[:1]) is grpc.StatusCode.OK
    found = by_kind(exporter)
    check = found[SpanKind.INTERNAL]
    assert check.parent == found[SpanKind.SERVER].context
    assert (own(check)["guard.decision"], own(check)["guard.enforced"]) == ("flag", "none")
    assert "guard.decision" not in own(found[SpanKind.SERVER])


async def test_nothing_is_done_without_the_api(
    monkeypatch: pytest.MonkeyPatch, exported: Path, served_profile: Path, upstream: Upstream, clean: Floats
) -> None:
    monkeypatch.setattr(tracing, "tracer", lambda: None)
    async with served(model=exported, profile=served_profile, upstream=upstream.address) as channel:
        assert await ask(channel, clean[:1]) is grpc.StatusCode.OK
    assert dict(upstream.inferences()[0].metadata)["traceparent"] == TRACED[0][1]


class Collector:
    """A collector that takes spans by OTLP over gRPC."""

    def __init__(self) -> None:
        self.got: Queue[ExportTraceServiceRequest] = Queue()
        self._server = grpc.server(ThreadPoolExecutor(2))
        path = "opentelemetry.proto.collector.trace.v1.TraceService"
        handler = grpc.unary_unary_rpc_method_handler(
            self._export, ExportTraceServiceRequest.FromString, ExportTraceServiceResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(path, {"Export": handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def _export(self, request: ExportTraceServiceRequest, _: grpc.ServicerContext) -> ExportTraceServiceResponse:
        self.got.put(request)
        return ExportTraceServiceResponse()

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None)


def test_a_collector_gets_the_spans_of_a_sidecar_that_was_started_as_documented(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collector() as collector:
        settings = {
            "OTEL_SERVICE_NAME": "guard", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.address}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none",
        }  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        program = str(Path(sys.executable).parent / "opentelemetry-instrument")
        with launch("--model", exported, "--profile", served_profile, through=[program, "--"]) as sidecar:
            with connected(sidecar.address) as client:
                client.infer(infer_request(clean[:1]), metadata=TRACED)
            request = collector.got.get(timeout=WAIT_SECONDS)
    (resource,) = request.resource_spans
    assert {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"] == "guard"
    (span,) = resource.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == (INFER, TRACE, PARENT)
