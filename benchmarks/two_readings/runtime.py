"""MLServer runtimes that read images in different ways; run in MLServer's environment, which has no guard."""

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnxruntime
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.types import (  # type: ignore[import-not-found]
    InferenceRequest,
    InferenceResponse,
    RequestInput,
    ResponseOutput,
)
from numpy.typing import NDArray
from PIL import Image, ImageOps

try:
    import cv2  # type: ignore[import-not-found]
except ModuleNotFoundError:
    cv2 = None

Pixels = NDArray[np.uint8]


def _rgb(image: Image.Image) -> Image.Image:
    """RGB as most programs make it; of 16-bit grey the high byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _resized(image: Image.Image, size: int, filter_: int) -> Pixels:
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), filter_))


def pillow(file: bytes, size: int) -> Pixels:
    """RGB first, then bicubic, as transformers does."""
    return _resized(_rgb(Image.open(io.BytesIO(file))), size, Image.Resampling.BICUBIC)


def as_stored(file: bytes, size: int) -> Pixels:
    """Resized in the colour mode of the file, as open_clip and torchvision do."""
    image = Image.open(io.BytesIO(file))
    return np.asarray(_rgb(image if image.size == (size, size) else image.resize((size, size))))


def nearest(file: bytes, size: int) -> Pixels:
    """Pixels are picked, not averaged."""
    return _resized(_rgb(Image.open(io.BytesIO(file))), size, Image.Resampling.NEAREST)


def corner(file: bytes, size: int) -> Pixels:
    """The first pixel of each square is picked."""
    pixels = np.asarray(_rgb(Image.open(io.BytesIO(file))))
    steps = [np.arange(size) * side // size for side in pixels.shape[:2]]
    found: Pixels = pixels[steps[0][:, None], steps[1]]
    return found


def upright(file: bytes, size: int) -> Pixels:
    """Turned as EXIF says."""
    return _resized(_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(file)))), size, Image.Resampling.BICUBIC)


def on_white(file: bytes, size: int) -> Pixels:
    """What is transparent is white."""
    image: Image.Image = Image.open(io.BytesIO(file))
    if not image.mode.startswith("I"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _resized(_rgb(image), size, Image.Resampling.BICUBIC)


def last_frame(file: bytes, size: int) -> Pixels:
    """The last of several frames."""
    image = Image.open(io.BytesIO(file))
    image.seek(getattr(image, "n_frames", 1) - 1)
    return _resized(_rgb(image), size, Image.Resampling.BICUBIC)


def opencv(file: bytes, size: int) -> Pixels:
    """OpenCV: upright, and bilinear without averaging."""
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("OpenCV cannot read the image")
    found: Pixels = cv2.cvtColor(cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR), cv2.COLOR_BGR2RGB)
    return found


READERS = {
    reader.__name__: reader
    for reader in (pillow, as_stored, nearest, corner, upright, on_white, last_frame, *([opencv] if cv2 else []))
}


class Classifier(MLModel):  # type: ignore[misc]
    """Answers the predicted class of each image of its first input; the model's name says how images are read."""

    async def load(self) -> bool:
        """Read what `guard export` wrote."""
        folder = Path(self.settings.parameters.uri)
        self._manifest = json.loads((folder / "classifier.json").read_bytes())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self._read = READERS.get(self.name, pillow)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Classify."""
        (logits,) = self._session.run(["logits"], {"image": self._images(payload.inputs[0])})
        winners = logits.argmax(axis=1)
        output = ResponseOutput(name="winner", datatype="INT64", shape=[len(winners)], data=winners.tolist())
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])

    async def predict_stream(self, payloads: AsyncIterator[InferenceRequest]) -> AsyncIterator[InferenceResponse]:
        """Classify, message by message."""
        async for payload in payloads:
            yield await self.predict(payload)

    def _images(self, tensor: RequestInput) -> NDArray[np.float32]:
        if tensor.datatype == "FP32":
            return np.array(tensor.data.root, np.float32).reshape(tensor.shape)
        preprocessing = self._manifest["preprocessing"]
        mean, std = (np.array(preprocessing[name], np.float32)[:, None, None] for name in ("mean", "std"))
        files = np.stack([self._read(file, preprocessing["size"]) for file in tensor.data.root])
        return ((files.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - mean) / std).astype(np.float32)
