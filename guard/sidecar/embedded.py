"""Embedded mode: the sidecar is the inference server, and one pass gives answer and embedding."""

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from guard import __version__
from guard.classifiers import ExportedClassifier
from guard.errors import RequestError
from guard.sidecar.annotations import annotate
from guard.sidecar.checking import Checker, OverloadedError
from guard.sidecar.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
)
from guard.sidecar.metrics import Metrics
from guard.sidecar.policy import Mode, Outcome, Reason
from guard.sidecar.service import Context, InferenceService, Metadata, Method, RefusedError
from guard.sidecar.settings import Settings
from guard.sidecar.tensors import add_output, uses_shared_memory
from guard.sidecar.watch import Request

VERSION = "1"
LOGITS, LABEL = "logits", "label"


class EmbeddedService(InferenceService):
    """Serves an exported classifier.

    Inputs: one tensor, FP32 [N, 3, H, W] (preprocessed) or BYTES [N] (JPEG, PNG or WebP files). Outputs: `logits`
    FP32 [N, C] and `label` BYTES [N]. The embedding is not an output: it would help an attacker to stay near the bank.
    """

    def __init__(self, settings: Settings, checker: Checker, metrics: Metrics, model: ExportedClassifier) -> None:
        super().__init__(settings, checker, metrics)
        self._model = model
        self._labels = [name.encode() for name in model.classes.names]

    async def ready(self) -> bool:
        """Always: the model was loaded before the port was opened."""
        return True

    def methods(self) -> dict[str, Method]:
        """The five that answer from memory."""
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
        }

    async def infer(self, data: bytes, request: Request, context: Context) -> tuple[bytes, Outcome, Metadata]:
        """Classify and screen."""
        del data, context
        message = request.message
        self._check_name(message.model_name, message.model_version)
        if uses_shared_memory(message):
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "guard: a tensor lies in shared memory, which this server does not have",
                reason=Reason.SHARED_MEMORY,
            )
        wanted = self._wanted(message)
        try:
            result = await self.checker.infer(request)
        except OverloadedError as error:
            # One pass would have given answer and decision: there is nothing to serve, whatever the policy.
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, "guard: too many requests wait to be answered", reason=Reason.OVERLOADED
            ) from error
        response = ModelInferResponse(model_name=message.model_name, model_version=VERSION, id=message.id)
        raw = bool(message.raw_input_contents)
        if LOGITS in wanted:
            add_output(response, LOGITS, result.logits, raw=raw)
        if LABEL in wanted:
            add_output(response, LABEL, [self._labels[i] for i in np.argmax(result.logits, axis=1)], raw=raw)
        if self.settings.mode is not Mode.SHADOW:
            annotate(response, result.outcome, self.settings.mode)
        return response.SerializeToString(), result.outcome, ()

    @staticmethod
    def _wanted(request: ModelInferRequest) -> set[str]:
        """The outputs to send; all, if the request names none."""
        for output in request.outputs:
            if output.name not in {LOGITS, LABEL}:
                raise RequestError(f"there is no output {output.name!r}; the model has {LOGITS!r} and {LABEL!r}")
            if "classification" in output.parameters:
                raise RequestError(f"output {output.name!r}: classification is not supported")
        return {output.name for output in request.outputs} or {LOGITS, LABEL}

    def _check_name(self, name: str, version: str) -> None:
        if name != self.settings.name or version not in {"", VERSION}:
            served = f"{self.settings.name!r} (version {VERSION})"
            message = f"guard: there is no model {name[:128]!r} here; {served} is served"
            raise RefusedError(grpc.StatusCode.NOT_FOUND, message, reason=Reason.MODEL_UNKNOWN)

    async def _server_live(self, data: bytes, _: Context) -> bytes:
        _parse(ServerLiveRequest(), data)
        return ServerLiveResponse(live=True).SerializeToString()

    async def _server_ready(self, data: bytes, _: Context) -> bytes:
        _parse(ServerReadyRequest(), data)
        return ServerReadyResponse(ready=True).SerializeToString()

    async def _model_ready(self, data: bytes, _: Context) -> bytes:
        request = ModelReadyRequest()
        _parse(request, data)
        self._check_name(request.name, request.version)
        return ModelReadyResponse(ready=True).SerializeToString()

    async def _server_metadata(self, data: bytes, _: Context) -> bytes:
        _parse(ServerMetadataRequest(), data)
        return ServerMetadataResponse(name="guard", version=__version__).SerializeToString()

    async def _model_metadata(self, data: bytes, _: Context) -> bytes:
        request = ModelMetadataRequest()
        _parse(request, data)
        self._check_name(request.name, request.version)
        tensor, size = ModelMetadataResponse.TensorMetadata, self._model.preprocessing.size
        return ModelMetadataResponse(
            name=self.settings.name,
            versions=[VERSION],
            platform="onnxruntime_onnx",
            inputs=[tensor(name=self.settings.input, datatype="FP32", shape=[-1, 3, size, size])],
            outputs=[
                tensor(name=LOGITS, datatype="FP32", shape=[-1, len(self._labels)]),
                tensor(name=LABEL, datatype="BYTES", shape=[-1]),
            ],
            properties={"guard_input_files": f"{self.settings.input} may also be BYTES [-1]: JPEG, PNG or WebP files"},
        ).SerializeToString()


def _parse(message: Message, data: bytes) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"guard: not a {type(message).__name__}") from error
