"""An Open Inference Protocol v2 server that answers as a test tells it to, and remembers every call."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from guard import __version__
from guard.errors import RequestError, UsageError
from guard.protocol import DESCRIBING_METHODS, SERVICE
from guard.protocol.dialects import ASK_FOR_FINAL, ERRORS_AS_STATUS, FINAL, error_reply
from guard.protocol.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerLiveResponse,
    ServerMetadataResponse,
    ServerReadyResponse,
)
from guard.protocol.messages import parse_request
from guard.testing.dialects import REPOSITORY_METHODS, Dialect, repository_reply, stream_reply
from guard.testing.faults import Call, FailedError, Fault, Pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tensors: TypeAlias = "Mapping[str, NDArray[Any]]"
Model: TypeAlias = "Callable[[Tensors], Tensors | Iterable[Tensors]]"
Method: TypeAlias = Callable[[Iterator[bytes]], Iterable[bytes]]
Context: TypeAlias = Any
"""grpc.ServicerContext; grpc publishes no types."""

_POLL_SECONDS = 0.02


class InferenceServer:
    """An inference server for tests: real gRPC on the loopback interface, answered by a function.

    It serves the six methods of the protocol. It serves `ModelStreamInfer` and the model repository like the server
    whose `dialect` it has; all other methods are UNIMPLEMENTED. It differs from these servers in that it has no shared
    memory, no model versions (a version is echoed), no classification extension and no tensors in `ModelMetadata`.
    Calls that load or unload a model are answered and remembered, but have no effect.

    >>> import numpy as np
    >>> import tritonclient.grpc as triton
    >>> from guard.testing import InferenceServer
    >>> def double(inputs):
    ...     return {"twice": 2 * inputs["x"]}
    >>> with InferenceServer(double) as server, triton.InferenceServerClient(server.address) as client:
    ...     tensor = triton.InferInput("x", [3], "INT64").set_data_from_numpy(np.array([1, 2, 3]))
    ...     reply = client.infer("doubler", [tensor], headers={"tenant": "blue"})
    >>> reply.as_numpy("twice")
    array([2, 4, 6])
    >>> server.received[-1].inputs
    {'x': array([1, 2, 3])}
    >>> ("tenant", "blue") in server.received[-1].metadata
    True

    The attributes may be set at any time and from any thread, and apply from the next message on; `reset` restores
    them. All but `ready` concern inference requests and `methods`; the other methods are answered at once.

    Args:
        model: A function from inputs to outputs, both arrays by name; several threads call it at a time. A single
            function serves every model name; a mapping serves the names that it has. BYTES are arrays of bytes objects.
            A function that returns an iterable of mappings, such as a generator, answers one message of a stream with
            several (Triton's decoupled models). A RequestError that it raises becomes INVALID_ARGUMENT, any other error
            INTERNAL.
        dialect: In Triton's streams each message has an envelope, with room for an error, and replies are raw. In
            MLServer's there is no envelope, and a reply has the form of its request. KServe is like MLServer, without
            streams.
        address: HOST:PORT, where port 0 lets the system choose, or `unix:PATH`.
        name: Name of the server in its metadata; None for the name of the dialect.
        methods: Additional methods of any arity, by name or, for other services, by path. Each is a function from the
            messages that arrive to the messages that are sent.
        workers: The most calls at a time; a stream counts as long as it lasts.
        memory: The most calls that are remembered; the oldest are forgotten first.

    Attributes:
        address: The address for clients.
        ready: What `ServerReady` and `ModelReady` answer.
        open: While this event is cleared, calls wait.
        cancelled: Set when a waiting call ends before its answer, because of its client or its deadline.
        fault: The error that is sent instead of an answer, if any.
        shapes: Shapes that outputs claim instead of their own, by name.
        answer: A function that replaces the model, from a serialised request to a serialised reply: for replies that no
            model gives.
        initial: Metadata that are sent before an answer.
        trailing: Metadata that are sent after an answer.

    Raises:
        UsageError: There is no such dialect.
    """

    def __init__(
        self,
        model: "Model | Mapping[str, Model]",
        *,
        dialect: Dialect = "triton",
        address: str = "127.0.0.1:0",
        name: str | None = None,
        methods: Mapping[str, Method] | None = None,
        workers: int = 16,
        memory: int = 10_000,
    ) -> None:
        if dialect not in REPOSITORY_METHODS:
            raise UsageError(f"there is no dialect {dialect!r}; take one of {', '.join(REPOSITORY_METHODS)}")
        self.address = address
        self.open, self.cancelled = threading.Event(), threading.Event()
        self._model, self._dialect, self._name = model, dialect, name or dialect
        self._methods, self._workers = dict(methods or {}), workers
        self._received: deque[Call] = deque(maxlen=memory)
        self._running: tuple[Any, ThreadPoolExecutor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the received calls, and restore every attribute but `address`."""
        self._received.clear()
        self.ready = True
        self.fault: Fault | None = None
        self.shapes: Mapping[str, Sequence[int]] = {}
        self.answer: Callable[[bytes], bytes] | None = None
        self.initial: Pairs = ()
        self.trailing: Pairs = ()
        self.cancelled.clear()
        self.open.set()

    @property
    def received(self) -> list[Call]:
        """The calls that were received, in their order."""
        return list(self._received)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start to listen.

        Raises:
            UsageError: The server runs already, or cannot listen at its address.
        """
        if self._running is not None:
            raise UsageError("the server runs already; stop it first")
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="inference-server")
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # Without this, a second server on the same port would start and take half of the calls.
            ("grpc.so_reuseport", 0),
        ]
        server = grpc.server(pool, handlers=[_Handlers(self._handler)], options=options)
        try:
            port = server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise UsageError(f"cannot listen on {self.address}: the address is taken or not of this machine") from error
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
        server.start()
        self._running = server, pool

    def stop(self) -> None:
        """End every call and connection at once, as a crash would; `start` listens at the same address again."""
        if self._running is not None:
            (server, pool), self._running = self._running, None
            server.stop(None).wait()
            pool.shutdown()

    def drop_connections(self) -> None:
        """Break every connection, so that calls end with UNAVAILABLE; new connections are served."""
        self.stop()
        self.start()

    def respond(self, data: bytes) -> bytes:
        """The serialised reply of the model to a serialised request: for an `answer` that changes it.

        An error of the model becomes an error of the call, within `answer` too.
        """
        request, result = self._run(data)
        if not isinstance(result, Mapping):
            raise FailedError(grpc.StatusCode.UNIMPLEMENTED, "a decoupled model is served by ModelStreamInfer only")
        return self._reply(request, result).SerializeToString()

    def _run(self, data: bytes) -> "tuple[ModelInferRequest, Tensors | Iterable[Tensors]]":
        from guard.protocol.tensors import read_inputs

        with _as_faults():
            request = parse_request(data)
            model = self._model if callable(self._model) else self._model.get(request.model_name)
            if model is None:
                raise FailedError(grpc.StatusCode.NOT_FOUND, f"there is no model {request.model_name!r}")
            return request, model(read_inputs(request))

    def _reply(self, request: ModelInferRequest, outputs: Tensors) -> ModelInferResponse:
        import numpy as np  # here and in `_run`, so that a test pays for numpy only if it uses arrays

        from guard.protocol.tensors import add_output

        reply = ModelInferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
        with _as_faults():
            names = [output.name for output in request.outputs] or list(outputs)
            if missing := set(names) - set(outputs):
                raise RequestError(f"there is no output {min(missing)!r}; the model has {sorted(outputs)}")
            raw = self._dialect == "triton" or bool(request.raw_input_contents)
            for name in names:
                add_output(reply, name, np.asarray(outputs[name]), raw=raw, shape=self.shapes.get(name))
        return reply

    def _stream_replies(self, data: bytes) -> Iterator[bytes]:
        if self.answer is not None:
            yield self.answer(data)
            return
        request, result = self._run(data)
        decoupled = not isinstance(result, Mapping)
        marked = self._dialect == "triton" and request.parameters[ASK_FOR_FINAL].bool_param
        several = iter([result] if isinstance(result, Mapping) else result)
        while True:
            with _as_faults():
                outputs = next(several, None)
            if outputs is None:
                break
            reply = self._reply(request, outputs)
            if marked:
                reply.parameters[FINAL].bool_param = not decoupled
            yield reply.SerializeToString()
        if marked and decoupled:
            last = self._reply(ModelInferRequest(model_name=request.model_name, id=request.id), {})
            last.parameters[FINAL].bool_param = True
            yield last.SerializeToString()

    def _handler(self, path: str) -> grpc.RpcMethodHandler:
        method = path.removeprefix(f"/{SERVICE}/")
        if method in self._methods:
            return grpc.stream_stream_rpc_method_handler(partial(self._additional, method))
        if method == "ModelInfer":
            return grpc.unary_unary_rpc_method_handler(self._infer)
        if method == "ModelStreamInfer" and self._dialect != "kserve":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if method in DESCRIBING_METHODS or method in REPOSITORY_METHODS[self._dialect]:
            return grpc.unary_unary_rpc_method_handler(partial(self._describe, method))
        # A handler for streams serves calls of every arity.
        return grpc.stream_stream_rpc_method_handler(partial(self._unknown, method))

    def _infer(self, data: bytes, context: Context) -> bytes:
        self._admit("ModelInfer", data, context)
        if (fault := self.fault) is not None:
            _abort(context, fault)
        context.send_initial_metadata(self.initial)
        try:
            reply = (self.answer or self.respond)(data)
        except FailedError as error:
            _abort(context, error.fault)
        context.set_trailing_metadata(self.trailing)
        return reply

    def _stream(self, messages: Iterator[bytes], context: Context) -> Iterator[bytes]:
        context.send_initial_metadata(self.initial)
        enveloped = self._dialect == "triton"
        aborts = not enveloped or (ERRORS_AS_STATUS, "true") in _metadata(context)
        for data in messages:
            self._admit("ModelStreamInfer", data, context)
            fault = self.fault
            if fault is None:
                try:
                    for reply in self._stream_replies(data):
                        yield stream_reply(reply) if enveloped else reply
                except FailedError as error:
                    fault = error.fault
            if fault is not None:
                if aborts:
                    _abort(context, fault)
                yield error_reply(fault.details, model="", request_id=_id(data))
        context.set_trailing_metadata(self.trailing)

    def _additional(self, method: str, messages: Iterator[bytes], context: Context) -> Iterator[bytes]:
        def admitted() -> Iterator[bytes]:
            for data in messages:
                self._admit(method, data, context)
                if (fault := self.fault) is not None:
                    _abort(context, fault)
                yield data

        context.send_initial_metadata(self.initial)
        yield from self._methods[method](admitted())
        context.set_trailing_metadata(self.trailing)

    def _unknown(self, method: str, messages: Iterator[bytes], context: Context) -> Iterator[bytes]:
        self._record(method, next(messages, b""), context)
        _abort(context, Fault(grpc.StatusCode.UNIMPLEMENTED, f"this server has no method {method}"))

    def _describe(self, method: str, data: bytes, context: Context) -> bytes:
        self._record(method, data, context)
        try:
            reply = self._known(method, data)
        except DecodeError:
            _abort(context, Fault(grpc.StatusCode.INTERNAL, f"the message is not a {method}Request"))
        except FailedError as error:
            _abort(context, error.fault)
        return reply

    def _known(self, method: str, data: bytes) -> bytes:
        names = () if callable(self._model) else tuple(self._model)
        if method in REPOSITORY_METHODS[self._dialect]:
            return repository_reply(self._dialect, method, data, names)
        if method == "ServerLive":
            return ServerLiveResponse(live=True).SerializeToString()
        if method == "ServerReady":
            return ServerReadyResponse(ready=self.ready).SerializeToString()
        if method == "ServerMetadata":
            return ServerMetadataResponse(name=self._name, version=__version__).SerializeToString()
        if method == "ModelReady":
            known = callable(self._model) or ModelReadyRequest.FromString(data).name in names
            return ModelReadyResponse(ready=self.ready and known).SerializeToString()
        name = ModelMetadataRequest.FromString(data).name
        if not callable(self._model) and name not in names:
            raise FailedError(grpc.StatusCode.NOT_FOUND, f"there is no model {name!r}")
        return ModelMetadataResponse(name=name, platform="fake").SerializeToString()

    def _record(self, method: str, data: bytes, context: Context) -> None:
        remaining = context.time_remaining()
        # gRPC reports 292 billion years if there is no deadline.
        limit = remaining if remaining is not None and remaining < 1e9 else None
        self._received.append(Call(method, data, _metadata(context), limit))

    def _admit(self, method: str, data: bytes, context: Context) -> None:
        """Record a message, and wait while `open` is cleared."""
        self._record(method, data, context)
        while not self.open.wait(_POLL_SECONDS):
            if not context.is_active():
                self.cancelled.set()
                _abort(context, Fault(grpc.StatusCode.CANCELLED, "the call ended while it waited"))


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc publishes no types
    def __init__(self, find: Callable[[str], grpc.RpcMethodHandler]) -> None:
        self._find = find

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:  # noqa: ANN401 - as above
        return self._find(handler_call_details.method)


@contextmanager
def _as_faults() -> Iterator[None]:
    """Turn errors of a request or of a model into the faults that a client gets."""
    try:
        yield
    except FailedError:
        raise
    except RequestError as error:
        raise FailedError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
    except Exception as error:
        raise FailedError(grpc.StatusCode.INTERNAL, f"the model raised {type(error).__name__}: {error}") from error


def _id(data: bytes) -> str:
    try:
        return parse_request(data).id
    except RequestError:
        return ""


def _metadata(context: Context) -> Pairs:
    return tuple((item.key, item.value) for item in context.invocation_metadata())


def _abort(context: Context, fault: Fault) -> NoReturn:
    context.set_trailing_metadata(fault.trailing)
    context.abort(fault.code, fault.details)
    raise AssertionError("abort always raises")
