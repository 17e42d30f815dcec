"""Whatever a client sends and OpenTelemetry's parts do, spans end no request."""

import asyncio
import logging
from collections.abc import Iterator

import pytest
from opentelemetry import propagate
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, get_tracer_provider

from guard.sidecar.policy import Outcome, Reason
from guard.sidecar.telemetry import tracing

PATH, ADDRESS = "/inference.GRPCInferenceService/ModelInfer", "127.0.0.1:1"
CLIENT = (("x-amzn-trace-id", "Root=1"), ("picture-bin", b"\x00"))


@pytest.fixture(autouse=True)
def _said_anew() -> Iterator[None]:
    tracing._tell.cache_clear()
    yield
    tracing._tell.cache_clear()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    install(monkeypatch, SimpleSpanProcessor(exporter))
    return exporter


def install(monkeypatch: pytest.MonkeyPatch, *processors: SpanProcessor) -> None:
    provider = TracerProvider()
    for each in processors:
        provider.add_span_processor(each)
    monkeypatch.setattr(tracing, "tracer", lambda: provider.get_tracer("guard"))


class Broken(SpanProcessor):
    def __init__(self, *names: str) -> None:
        for name in names:
            setattr(self, name, self.fail)

    def fail(self, *_: object, **__: object) -> None:
        raise RuntimeError("the processor is broken")


def answered() -> tuple[str, tracing.Metadata]:
    """A request with its hop: the id of its trace, and what the upstream server would get."""
    with tracing.server_span(PATH, CLIENT) as span, tracing.client_span(PATH, ADDRESS, CLIENT) as metadata:
        span.decided(Outcome.unchecked(Reason.ERROR), "none")
        return tracing.current_trace(), metadata


@pytest.mark.parametrize("names", [("on_start",), ("on_end",), ("on_start", "on_end")])
def test_a_processor_that_fails_is_told_of_once(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Broken(*names))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert CLIENT[1] in answered()[1]
            with tracing.check_span() as span:
                span.describe(mode="tag")
    assert [each for each in caplog.messages if "processor" in each] == [
        "OpenTelemetry fails, so spans are lost: RuntimeError: the processor is broken (said once)"
    ]


def test_a_propagator_that_fails_costs_the_parent_alone(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("unreadable")

    monkeypatch.setattr(propagate, "extract", fail)
    monkeypatch.setattr(propagate, "inject", fail)
    assert answered()[1] == CLIENT
    assert [span.kind for span in exporter.get_finished_spans()] == [SpanKind.CLIENT, SpanKind.SERVER]


def test_names_with_capitals_are_read_and_written_as_grpc_has_them(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = []
    sent = {"X-Amzn-Trace-Id": "Root=2", "grpc-timeout": "1n", "a b": "c", "x-bin": "y", "ok": "line\nbreak", "no": "é"}

    def extract(carrier: dict[str, str]) -> None:
        got.append(carrier.get("X-Amzn-Trace-Id"))

    def inject(carrier: dict[str, str]) -> None:
        for name, value in sent.items():
            carrier[name] = value  # noqa: PERF403 - as propagators do it

    monkeypatch.setattr(propagate, "extract", extract)
    monkeypatch.setattr(propagate, "inject", inject)
    assert answered()[1] == (CLIENT[1], ("x-amzn-trace-id", "Root=2"))
    assert got == ["Root=1"]
    assert len(exporter.get_finished_spans()) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        (("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"),),
        (("traceparent", "\xff" * 1000), ("tracestate", "=,=" * 5000)),
        (("baggage", "a=%0d%0aevil:%201;" + ",".join(f"k{n}={n}" * 50 for n in range(500))),),
    ],
)
def test_hostile_parents_are_ignored_and_led_nowhere(
    exporter: InMemorySpanExporter, metadata: tracing.Metadata
) -> None:
    with tracing.server_span(PATH, metadata), tracing.client_span(PATH, ADDRESS, ()) as told:
        assert len(tracing.current_trace()) == 32
        assert [name for name, _ in told] == ["traceparent"]
    assert all(found.parent is None for found in exporter.get_finished_spans() if found.kind is SpanKind.SERVER)


async def test_the_span_of_a_cancelled_request_ends(exporter: InMemorySpanExporter) -> None:
    entered = asyncio.Event()

    async def request() -> None:
        with tracing.server_span(PATH, ()), tracing.client_span(PATH, ADDRESS, ()):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(request())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    found: tuple[ReadableSpan, ...] = exporter.get_finished_spans()
    assert [span.kind for span in found] == [SpanKind.CLIENT, SpanKind.SERVER]
    assert {(span.attributes or {})["rpc.response.status_code"] for span in found} == {"CANCELLED"}


def test_an_error_of_the_request_itself_passes_through(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(KeyError), tracing.server_span(PATH, ()):
        raise KeyError("mine")
    (span,) = exporter.get_finished_spans()
    assert span.events == ()
    assert (span.attributes or {})["rpc.response.status_code"] == "INTERNAL"


def test_with_the_api_alone_the_trace_of_the_client_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "tracer", lambda: get_tracer_provider().get_tracer("guard"))
    parent = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    with tracing.server_span(PATH, (parent,)), tracing.client_span(PATH, ADDRESS, (parent,)) as told:
        assert tracing.current_trace() == "0af7651916cd43dd8448eb211c80319c"
        assert told == (parent,)
