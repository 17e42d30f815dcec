"""Embedded mode: the sidecar is the inference server, and one forward pass gives the answer and the embedding."""

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from guard import __version__
from guard.classifiers import ExportedClassifier
from guard.errors import RequestError
from guard.protocol.inference_pb2 import (
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
from guard.protocol.messages import uses_shared_memory
from guard.protocol.tensors import add_output
from guard.sidecar.decisions.models import Served
from guard.sidecar.decisions.routes import Request
from guard.sidecar.decisions.workers import OverloadedError
from guard.sidecar.inference.annotations import annotate
from guard.sidecar.inference.calls import Context, Metadata, RefusedError
from guard.sidecar.inference.screener import enforce
from guard.sidecar.inference.service import InferenceService, UnaryHandler
from guard.sidecar.policy import MAX_MESSAGE, Mode, Outcome, Reason

EMBEDDING, LOGITS, LABEL = "embedding", "logits", "label"
_LONGEST_QUESTION = 2**18
"""Bytes of a request for metadata or readiness, which carries a name and a version."""


class EmbeddedService(InferenceService):
    """Serves exported classifiers itself.

    A classifier of images has one input, FP32 [N, 3, H, W] (preprocessed) or BYTES [N] (JPEG, PNG or WebP files), and
    the outputs `logits` FP32 [N, C] and `label` BYTES [N]. The embedding is not an output: it would help an attacker to
    stay near the bank. A text tower has one input, BYTES [N] (texts in UTF-8) or INT64 [N, L] (token ids), and the
    output `embedding` FP32 [N, D], which is what it is served for.
    """

    async def ready(self) -> bool:
        """Always true: the models are loaded before the port is opened."""
        return True

    async def close(self) -> None:
        """Do nothing: nothing runs in the background."""

    def methods(self) -> dict[str, UnaryHandler]:
        """The five methods that describe the server and its models."""
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
        }

    async def infer(self, request: Request, context: Context) -> tuple[bytes, Outcome, Metadata]:
        """Classify and screen the images of one request."""
        del context
        message = request.message
        served = self._find(message.model_name, message.model_version)
        checker = request.route.checker
        if checker is None or checker.model is None:
            raise ValueError("every model of embedded mode has a checker and an exported classifier")
        if uses_shared_memory(message):
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "guard: a tensor lies in shared memory, which this server does not have",
                reason=Reason.SHARED_MEMORY,
            )
        if request.route.barred is not None:
            enforce(request.route.barred, request.route)
        wanted = self._wanted(message, checker.model)
        try:
            result = await checker.infer(message, request.trace_id)
        except OverloadedError as error:
            # The answer and the decision come from the same pass, so there is nothing to serve, whatever the policy.
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, "guard: too many requests wait to be answered", reason=Reason.OVERLOADED
            ) from error
        response = ModelInferResponse(model_name=message.model_name, model_version=served.version, id=message.id)
        raw = bool(message.raw_input_contents)
        if EMBEDDING in wanted:
            add_output(response, EMBEDDING, result.embeddings, raw=raw)
        if LOGITS in wanted:
            add_output(response, LOGITS, result.logits, raw=raw)
        if LABEL in wanted:
            names = checker.model.classes.names
            add_output(response, LABEL, [names[i].encode() for i in np.argmax(result.logits, axis=1)], raw=raw)
        if served.settings.mode is not Mode.SHADOW:
            annotate(response, result.outcome, served.settings.mode)
        return response.SerializeToString(), result.outcome, ()

    @staticmethod
    def _wanted(request: ModelInferRequest, model: ExportedClassifier) -> set[str]:
        """The names of the outputs to send: all outputs, if the request lists none."""
        own = {LOGITS, LABEL} if model.text is None else {EMBEDDING}
        for output in request.outputs:
            if output.name not in own:
                names = " and ".join(map(repr, sorted(own, reverse=True)))
                raise RequestError(f"there is no output {output.name!r}; the model has {names}")
            if "classification" in output.parameters:
                raise RequestError(f"output {output.name!r}: classification is not supported")
        return {output.name for output in request.outputs} or own

    def _find(self, name: str, version: str) -> Served:
        if (served := self._screener.models.find(name, version)) is not None:
            return served
        first = self._screener.models.served[:8]
        names = ", ".join(f"{served.settings.model_name!r} (version {served.version})" for served in first)
        message = f"guard: there is no model {name[:128]!r} of version {version[:128]!r} here; {names} is served"
        raise RefusedError(grpc.StatusCode.NOT_FOUND, message[:MAX_MESSAGE], reason=Reason.MODEL_UNKNOWN)

    async def _server_live(self, data: bytes, _: Context) -> bytes:
        _parse(ServerLiveRequest(), data)
        return ServerLiveResponse(live=True).SerializeToString()

    async def _server_ready(self, data: bytes, _: Context) -> bytes:
        _parse(ServerReadyRequest(), data)
        return ServerReadyResponse(ready=True).SerializeToString()

    async def _model_ready(self, data: bytes, _: Context) -> bytes:
        request = ModelReadyRequest()
        _parse(request, data)
        self._find(request.name, request.version)
        return ModelReadyResponse(ready=True).SerializeToString()

    async def _server_metadata(self, data: bytes, _: Context) -> bytes:
        _parse(ServerMetadataRequest(), data)
        return ServerMetadataResponse(name="guard", version=__version__).SerializeToString()

    async def _model_metadata(self, data: bytes, _: Context) -> bytes:
        request = ModelMetadataRequest()
        _parse(request, data)
        served = self._find(request.name, request.version)
        settings, model = served.settings, served.checker.model
        if model is None:
            raise ValueError("every model of embedded mode has an exported classifier")
        tensor, size = ModelMetadataResponse.TensorMetadata, model.preprocessing.size
        inputs = [tensor(name=settings.input_tensor, datatype="FP32", shape=[-1, 3, size, size])]
        outputs = [
            tensor(name=LOGITS, datatype="FP32", shape=[-1, len(model.classes.names)]),
            tensor(name=LABEL, datatype="BYTES", shape=[-1]),
        ]
        also = {"guard_input_files": f"{settings.input_tensor} may also be BYTES [-1]: JPEG, PNG or WebP files"}
        if model.text is not None:
            inputs = [tensor(name=settings.input_tensor, datatype="BYTES", shape=[-1])]
            outputs = [tensor(name=EMBEDDING, datatype="FP32", shape=[-1, model.manifest.embedding])]
            also = {"guard_input_ids": f"{settings.input_tensor} may also be INT64 or INT32 [-1, -1]: token ids"}
        return ModelMetadataResponse(
            name=settings.model_name,
            versions=[
                each.version for each in self._screener.models.served if each.settings.model_name == settings.model_name
            ],
            platform="onnxruntime_onnx",
            inputs=inputs,
            outputs=outputs,
            properties=also,
        ).SerializeToString()


def _parse(message: Message, data: bytes) -> None:
    refusal = RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"guard: not a {type(message).__name__}")
    if len(data) > _LONGEST_QUESTION:
        raise refusal
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise refusal from error
