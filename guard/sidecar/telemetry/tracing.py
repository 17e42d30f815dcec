"""Spans of requests, through the API of OpenTelemetry where that is installed (extra `otel`).

guard makes spans and never configures where they go: whoever starts the sidecar does, for example with
`opentelemetry-instrument guard serve …`. With the API alone nothing is recorded, and without it nothing is done.

Names follow the semantic conventions for RPC (`rpc.*`), and the draft of those for guardrails: what guard found
(`guard.decision`) is told apart from what it did about it (`guard.enforced`).
"""

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import grpc
import numpy as np

from guard import __version__
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.policy import Outcome

if TYPE_CHECKING:
    from opentelemetry.context import Context as ParentContext
    from opentelemetry.trace import Span as ApiSpan
    from opentelemetry.trace import SpanKind, Tracer

log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str | bytes], ...]
Enforced = Literal["refused", "annotated", "none"]

_KEY, _VALUE = re.compile(r"(?!grpc-)[a-z0-9_.-]+(?<!-bin)"), re.compile(r"[ -~]+")
"""Names and texts that metadata may have."""
_FAULTS_OF_SERVERS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes by which the span of a server is an error; the others say that the client did something wrong."""


class Span:
    """A span that has begun; without the API, one that records nothing.

    Args:
        span: The span of the API; None without the API.
    """

    def __init__(self, span: "ApiSpan | None" = None) -> None:
        self._span = span

    def describe(self, **attributes: str | float) -> None:
        """Add attributes `guard.*`; those that are "" are left out."""
        if self._span is not None:
            with _harmless():
                self._span.set_attributes({f"guard.{name}": value for name, value in attributes.items() if value != ""})

    def decided(self, outcome: Outcome, enforced: Enforced) -> None:
        """Add what guard found out about a request, and what it did about it."""
        if self._span is None:
            return
        self.describe(decision=outcome.decision, enforced=enforced, reason=outcome.reason or "")
        if outcome.flags is None or outcome.p_values is None:
            return
        self.describe(images=len(outcome.flags), flagged_images=int(np.sum(outcome.flags)))
        if outcome.alpha is not None:
            self.describe(alpha=outcome.alpha)
        if len(known := outcome.p_values[np.isfinite(outcome.p_values)]):
            self.describe(p_value=float(known.min()))
        if outcome.flags.any():
            first = int(np.argmax(outcome.flags))
            self.describe(decided_by=outcome.decided_by[first], trigger=outcome.triggers[first])

    def ended(self, code: grpc.StatusCode, *, of_client: bool = False) -> None:
        """Add the status that the call ended with.

        Args:
            code: The status.
            of_client: Whether the span is of a client, for whom every other status than OK is an error.
        """
        if self._span is None:
            return
        from opentelemetry.trace import StatusCode

        with _harmless():
            self._span.set_attribute("rpc.response.status_code", code.name)
            if code in _FAULTS_OF_SERVERS or (of_client and code is not grpc.StatusCode.OK):
                self._span.set_attribute("error.type", code.name)
                self._span.set_status(StatusCode.ERROR)


class _Carrier(dict[str, str]):
    """Metadata for a propagator, some of which write names with capitals; gRPC has none."""

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - as of a dict
        """The value under a name in any letters."""
        return super().get(key.lower(), default)

    def __setitem__(self, key: str, value: str) -> None:
        super().__setitem__(key.lower(), value)


@contextmanager
def server_span(path: str, metadata: Metadata) -> Iterator[Span]:
    """The span of a call that guard answers; it has the status of the error that leaves the block, or OK.

    Args:
        path: Path of the method.
        metadata: The client's metadata, which may name the parent.
    """
    if (maker := tracer()) is None:
        yield Span()
        return
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    parent = None
    with _harmless():
        parent = propagate.extract(_Carrier((key, value) for key, value in metadata if isinstance(value, str)))
    with (
        _current(maker, path.removeprefix("/"), parent, SpanKind.SERVER, _of_method(path)) as span,
        _of_call(span, of_client=False),
    ):
        yield span


@contextmanager
def client_span(path: str, address: str, metadata: Metadata) -> Iterator[Metadata]:
    """The metadata of a call to the upstream server that lead the trace there, within its span; its status as above.

    Args:
        path: Path of the method.
        address: Address of the upstream server.
        metadata: The metadata that are passed on.
    """
    if (maker := tracer()) is None:
        yield metadata
        return
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    attributes: dict[str, str | int] = {**_of_method(path), "server.address": address}
    if socket_path(address) is None:
        attributes["server.address"], attributes["server.port"] = split_address(address)
    with (
        _current(maker, path.removeprefix("/"), None, SpanKind.CLIENT, attributes) as span,
        _of_call(span, of_client=True),
    ):
        carrier = _Carrier()
        with _harmless():
            propagate.inject(carrier)
        # gRPC refuses a call with others.
        sent = {key: value for key, value in carrier.items() if _KEY.fullmatch(key) and _VALUE.fullmatch(value)}
        yield (*((key, value) for key, value in metadata if key not in sent), *sent.items())


@contextmanager
def check_span() -> Iterator[Span]:
    """The span of a check that no reply waits for."""
    if (maker := tracer()) is None:
        yield Span()
        return
    from opentelemetry.trace import SpanKind

    with _current(maker, "guard check", None, SpanKind.INTERNAL, {}) as span:
        yield span


@contextmanager
def _of_call(span: Span, *, of_client: bool) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        span.ended(_status(error), of_client=of_client)
        raise
    span.ended(grpc.StatusCode.OK, of_client=of_client)


def _status(error: BaseException) -> grpc.StatusCode:
    """The status of a call that ends with an error: gRPC's own errors and guard's refusals know theirs."""
    if isinstance(error, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.INTERNAL


@contextmanager
def _current(
    maker: "Tracer", name: str, parent: "ParentContext | None", kind: "SpanKind", attributes: dict[str, str | int]
) -> Iterator[Span]:
    """A span that is the current one in the block, and ends with it, whatever the SDK raises."""
    from opentelemetry import context, trace

    span, token = None, None
    with _harmless():
        span = maker.start_span(name, parent, kind, attributes)
        token = context.attach(trace.set_span_in_context(span))
    try:
        yield Span(span)
    finally:
        with _harmless():
            if token is not None:
                context.detach(token)
            if span is not None:
                span.end()


@contextmanager
def _harmless() -> Iterator[None]:
    """Requests are answered, whatever a propagator, a sampler, a processor or an exporter raises."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - `_tell` logs it
        _tell(type(error).__name__, str(error)[:200])


@lru_cache(maxsize=16)
def _tell(kind: str, text: str) -> None:
    log.warning("OpenTelemetry fails, so spans are lost: %s: %s (said once)", kind, text)


def current_trace() -> str:
    """Id of the trace of the current span, in hexadecimal; "" if there is none, or no API."""
    if tracer() is None:
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


@cache
def tracer() -> "Tracer | None":
    """What makes spans; None without the API. The first call imports it."""
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    return trace.get_tracer("guard", __version__)


def _of_method(path: str) -> dict[str, str | int]:
    return {"rpc.system.name": "grpc", "rpc.method": path.removeprefix("/")}
