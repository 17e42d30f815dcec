"""Requests whose answers are known beforehand, and a client that compares."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from benchmarks.soak.stage import CLEAN, Floats, Pool
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse

ANSWERED = frozenset({"pass", "flag"})
WRONG = "wrong answer"
"""Of another request, with another decision, twice, or of no request at all."""
HUNG, NO_REPLY, ERROR = "hung", "no reply", "error in the stream"
DEADLINE = 10.0
_MARGIN = 5.0
"""Seconds after its deadline from which on a call counts as hung."""
_MAX_BATCH = 8
_SERVICE = "/inference.GRPCInferenceService/"
_CANCELLED_HERE = "Locally cancelled by application!"


@dataclass(frozen=True, eq=False)
class Asked:
    """A message that is sent once.

    Attributes:
        kind: What is wrong with it, if anything.
        number: That no other message has.
        data: As sent.
        logits: That the upstream server computes, shape [N, D].
        flags: Which images are to be flagged, shape [N].
    """

    kind: str
    number: int
    data: bytes
    logits: Floats
    flags: tuple[bool, ...]

    def ended(self, way: str, outcome: str, reason: str = "", details: str = "") -> "Ended":
        """How it ended."""
        return Ended(self.kind, self.number, self.flags, way, outcome, reason, details)


@dataclass(frozen=True)
class Ended:
    """How a message ended.

    Attributes:
        kind: As asked.
        number: As asked.
        flags: As asked.
        way: `unary` or `stream`.
        outcome: `pass`, `flag`, one of the names above, or that of the call's gRPC status.
        reason: guard's, of the trailing metadata.
        details: Of the status.
    """

    kind: str
    number: int
    flags: tuple[bool, ...]
    way: str
    outcome: str
    reason: str = ""
    details: str = ""

    @property
    def answered(self) -> bool:
        """Whether it got the right reply."""
        return self.outcome in ANSWERED


class Requests:
    """Makes them.

    Args:
        pool: Of images.
        numbers: Not used before.
        generator: Draws images, and everything else.
    """

    def __init__(self, pool: Pool, numbers: Iterator[int], generator: np.random.Generator) -> None:
        self._pool, self._numbers, self._generator = pool, numbers, generator

    def make(self, kind: str, wait: float = 0.0) -> Asked:
        """A request of a kind.

        Args:
            kind: `clean`, `triggered`, `batch`, `truncated`, `wrong shape`, `not finite` or `wrong model`; others are
                one image, clean or not.
            wait: Seconds that the upstream server takes.
        """
        rows = self._rows(kind)
        images, number = self._pool.pixels[rows], next(self._numbers)
        if kind == "wrong shape":
            images = images[..., 1:]
        if kind == "not finite":
            images = np.where(images == images.flat[0], np.float32(np.nan), images)
        name = "another" if kind == "wrong model" else "classifier"
        request = ModelInferRequest(model_name=name, id=str(number))
        if self._generator.random() < 0.5:
            # The sidecar must ask for the embedding itself then, and take it out of the reply.
            for output in ("number", "logits"):
                request.outputs.add(name=output)
        contents = {"number": np.array([number]), "wait": np.array([wait], np.float32), "image": images}
        for name, values in contents.items():
            datatype = "INT64" if name == "number" else "FP32"
            request.inputs.add(name=name, datatype=datatype, shape=values.shape)
            request.raw_input_contents.append(values.tobytes())
        data = request.SerializeToString()
        if kind == "truncated":
            data = data[: -int(self._generator.integers(1, images.nbytes))]
        return Asked(kind, number, data, self._pool.embeddings[rows], tuple(self._pool.flags[rows].tolist()))

    def _rows(self, kind: str) -> list[int]:
        low = CLEAN if kind == "triggered" else 0
        high = CLEAN if kind == "clean" else len(self._pool.pixels)
        count = int(self._generator.integers(2, _MAX_BATCH + 1)) if kind == "batch" else 1
        return self._generator.integers(low, high, count).tolist()  # type: ignore[no-any-return]


class Client:
    """One connection, or one to each of several sidecars; calls block.

    gRPC's asyncio client would not do: it may report INTERNAL in place of the status of a stream (grpc/grpc#36066).

    Args:
        ports: Of the sidecars.
    """

    def __init__(self, *ports: int) -> None:
        options = [
            # Else all clients of this process share one connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        self._channel = grpc.insecure_channel(f"ipv4:{','.join(f'127.0.0.1:{port}' for port in ports)}", options)
        self._unary = self._channel.unary_unary(f"{_SERVICE}ModelInfer")
        self._stream = self._channel.stream_stream(f"{_SERVICE}ModelStreamInfer")

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def unary(self, asked: Asked, *, deadline: float = DEADLINE, cancel: float | None = None) -> Ended:
        """Send one message.

        Args:
            asked: The message.
            deadline: Seconds.
            cancel: Seconds after which the call is cancelled; None: it is not.
        """
        call = self._unary.future(asked.data, timeout=deadline)
        with _limited(call, deadline, cancel), suppress(grpc.RpcError, grpc.FutureCancelledError):
            outcome, details = _judged(asked, ModelInferResponse.FromString(call.result()))
            return asked.ended("unary", outcome, details=details)
        return asked.ended("unary", *_status(call, cancel))

    def stream(
        self,
        messages: Sequence[Asked],
        *,
        deadline: float = DEADLINE,
        cancel: float | None = None,
        status: bool = False,
    ) -> list[Ended]:
        """Send messages in one stream.

        Args:
            messages: At least one.
            deadline: Seconds, of the stream.
            cancel: Seconds after which it is cancelled; None: it is not.
            status: Whether an error is to be the status of the stream, instead of a message in it.
        """
        metadata = (("triton_grpc_error", "true"),) if status else ()
        waiting, ended = {asked.number: asked for asked in messages}, list[Ended]()
        call = self._stream((asked.data for asked in messages), timeout=deadline, metadata=metadata)
        with _limited(call, deadline, cancel), suppress(grpc.RpcError):
            for data in call:
                envelope = ModelStreamInferResponse.FromString(data)
                asked = _asked(envelope.infer_response.id, waiting)
                if asked is None:
                    details = f"nobody waits for the reply {envelope.infer_response.id!r}"
                    ended.append(messages[0].ended("stream", WRONG, details=details))
                    continue
                outcome, details = ERROR, envelope.error_message
                if not envelope.error_message:
                    outcome, details = _judged(asked, envelope.infer_response)
                ended.append(waiting.pop(asked.number).ended("stream", outcome, details=details))
        how = _status(call, cancel)
        return ended + [asked.ended("stream", *how) for asked in waiting.values()]


@contextmanager
def _limited(call: Any, deadline: float, cancel: float | None) -> Iterator[None]:  # noqa: ANN401 - grpc has no types
    """Cancel a call when that is wanted, or when it hangs."""
    timer = threading.Timer(deadline + _MARGIN if cancel is None else cancel, call.cancel)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _status(call: Any, cancel: float | None) -> tuple[str, str, str]:  # noqa: ANN401 - as above
    """Outcome, guard's reason and details of what got no reply."""
    code, trailing = call.code(), {item.key: item.value for item in call.trailing_metadata() or ()}
    outcome = NO_REPLY if code is grpc.StatusCode.OK else str(code.name)
    if cancel is None and call.details() == _CANCELLED_HERE:
        outcome = HUNG
    return outcome, trailing.get("guard-reason", ""), call.details() or ""


def _asked(request_id: str, waiting: dict[int, Asked]) -> Asked | None:
    """Whom a streamed reply is for; without an id, one whose own could not be read."""
    if request_id:
        return waiting.get(int(request_id)) if request_id.isdecimal() else None
    return next((asked for asked in waiting.values() if asked.kind == "truncated"), None)


def _judged(asked: Asked, response: ModelInferResponse) -> tuple[str, str]:
    """Decision, or `WRONG` and why."""
    raw = {output.name: data for output, data in zip(response.outputs, response.raw_output_contents, strict=True)}
    decision = response.parameters["guard_decision"].string_param
    if response.id != str(asked.number) or raw.get("number") != np.int64(asked.number).tobytes():
        return WRONG, f"number {asked.number} got the reply of {response.id}"
    logits = np.frombuffer(raw["logits"], np.float32)
    if len(logits) != asked.logits.size or not np.allclose(logits, asked.logits.ravel(), rtol=1e-3, atol=1e-3):
        return WRONG, f"number {asked.number} got the logits of another image"
    if decision != ("flag" if any(asked.flags) else "pass"):
        return WRONG, f"number {asked.number} got the decision {decision!r}"
    if len(asked.flags) > 1:
        each = b"".join(b"\x04\0\0\0" + (b"flag" if flag else b"pass") for flag in asked.flags)
        if raw["guard_decision"] != each:
            return WRONG, f"number {asked.number} got other decisions for its images"
    return decision, ""
