"""An MLServer runtime that serves what `guard export` wrote; it runs in MLServer's environment, which has no guard."""

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnxruntime
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.errors import InferenceError  # type: ignore[import-not-found]
from mlserver.types import (  # type: ignore[import-not-found]
    InferenceRequest,
    InferenceResponse,
    Parameters,
    RequestInput,
    ResponseOutput,
)
from mlserver.utils import get_model_uri  # type: ignore[import-not-found]
from numpy.typing import NDArray
from PIL import Image


class Classifier(MLModel):  # type: ignore[misc]
    """Outputs `logits`, `embedding` and `label`, or those that are asked for; echoes the header `tenant`."""

    async def load(self) -> bool:
        """Read what `guard export` wrote."""
        folder = Path(await get_model_uri(self.settings))
        self._manifest = json.loads((folder / "classifier.json").read_bytes())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Classify."""
        images = self._images(payload.inputs[0])
        embeddings, logits = self._session.run(["embedding", "logits"], {"image": images})
        names = self._manifest["classes"]["names"]
        known = {
            "logits": tensor("logits", logits),
            "embedding": tensor("embedding", embeddings),
            "label": ResponseOutput(
                name="label",
                datatype="BYTES",
                shape=[len(images)],
                data=[names[index].encode() for index in logits.argmax(axis=1)],
            ),
        }
        wanted = [output.name for output in payload.outputs or ()] or list(known)
        for name in wanted:
            if name not in known:
                raise InferenceError(f"there is no output {name}")
        headers = (payload.parameters and payload.parameters.headers) or {}
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[known[name] for name in wanted],
            parameters=Parameters(headers={"tenant": headers["tenant"]}) if "tenant" in headers else None,
        )

    async def predict_stream(self, payloads: AsyncIterator[InferenceRequest]) -> AsyncIterator[InferenceResponse]:
        """Classify, message by message."""
        async for payload in payloads:
            yield await self.predict(payload)

    def _images(self, tensor: RequestInput) -> NDArray[np.float32]:
        if tensor.datatype == "FP32":
            return np.array(tensor.data.root, np.float32).reshape(tensor.shape)
        preprocessing = self._manifest["preprocessing"]
        mean, std = (np.array(preprocessing[name], np.float32)[:, None, None] for name in ("mean", "std"))
        # Resizing is left to the client: programs do it in different ways.
        files = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in tensor.data.root]
        images: NDArray[np.float32] = (
            np.stack(files).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - mean
        ) / std
        return images


def tensor(name: str, values: NDArray[np.float32]) -> ResponseOutput:
    """An FP32 output."""
    return ResponseOutput(name=name, datatype="FP32", shape=list(values.shape), data=values.ravel().tolist())
