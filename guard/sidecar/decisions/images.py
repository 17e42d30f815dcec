"""Reading of the images of a request."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from guard.classifiers import Preprocessing, decode, decode_unambiguous, encode
from guard.classifiers.headers import read_headers
from guard.errors import ImageError, RequestError
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import with_elements
from guard.protocol.tensors import encoded_inputs, find_input, float_images, raw_contents
from guard.sidecar.decisions.inputs import Claims, Inputs
from guard.sidecar.decisions.workers import checkpoint
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ImageReader:
    """Reads the images of the requests of one model.

    Args:
        preprocessing: Preprocessing of the model.
        settings: Settings of the model.
        limits: Settings of the sidecar.
    """

    def __init__(self, preprocessing: Preprocessing, settings: ModelSettings, limits: Settings) -> None:
        self._preprocessing, self._settings, self._limits = preprocessing, settings, limits

    def find_input(self, request: ModelInferRequest) -> int:
        """The number of the input with the images; see `find_input`.

        Raises:
            RequestError: The input is missing, or the request can be read in different ways.
        """
        settings = self._settings
        return find_input(
            request, settings.input_tensor, others=settings.other_inputs, parameters=settings.pass_parameters
        )

    def claims(self, request: ModelInferRequest) -> Claims:
        """What a request claims to hold, before any image is decoded.

        Raises:
            RequestError: The request cannot be read in one way, or its images are beyond the limits in sum.
        """
        index, limits = self.find_input(request), self._limits
        tensor, raw = request.inputs[index], raw_contents(request, index)
        where = f"input {tensor.name[:128]!r}: "
        if tensor.datatype != "BYTES":
            return Claims(index, where, "image", None, 0, {})
        files = encoded_inputs(tensor, raw, limits.max_batch)
        try:
            work, troubles = read_headers(files, max_pixels=limits.max_pixels, max_work=limits.max_request_pixels)
        except ImageError as error:
            raise RequestError(f"{where}{error}") from error
        return Claims(index, where, "image", files, work, dict(troubles))

    def read(
        self,
        request: ModelInferRequest,
        claims: Claims,
        *,
        replaced: bool,
        ambiguous: bool,
        only: Collection[int] | None = None,
    ) -> Inputs:
        """Read the images of a request, each by itself.

        Args:
            request: The request.
            claims: What it claims to hold.
            replaced: Whether encoded images are forwarded as the pixels that are read here.
            ambiguous: Whether images may be read that other programs read differently.
            only: Numbers of the encoded images to decode; None for all.
        """
        preprocessing, limits, files = self._preprocessing, self._limits, claims.files
        size = preprocessing.size
        if files is None:
            tensor, raw = request.inputs[claims.index], raw_contents(request, claims.index)
            values = float_images(tensor, raw, (3, size, size), limits.max_batch)
            if np.isfinite(values).all():
                return Inputs(values, np.arange(len(values)), len(values), "")
            finite, trouble = np.isfinite(values).all(axis=(1, 2, 3)), "a value is not finite (NaN or infinity)"
            trouble = f"{claims.where}{trouble}"
            return Inputs(values[finite], np.flatnonzero(finite), len(values), trouble)
        pixels: dict[int, NDArray[np.uint8]] = {}
        for row, file in enumerate(files):
            if row in claims.troubles or (only is not None and row not in only):
                continue
            checkpoint()
            try:
                image = (
                    decode(file, max_pixels=limits.max_pixels)
                    if ambiguous
                    else decode_unambiguous(file, size=size, max_pixels=limits.max_pixels)
                )
                pixels[row] = preprocessing.pixels(image, max_pixels=limits.max_pixels)
            except ImageError as error:
                claims.troubles[row] = error
        read = np.array([*pixels.values()], np.uint8).reshape(-1, 3, size, size)
        canonical = None
        if replaced:
            # What cannot be read is forwarded as it is; the failure policy decides about it.
            sent = [encode(pixels[row]) if row in pixels else file for row, file in enumerate(files)]
            canonical = with_elements(request, claims.index, sent)
        return Inputs(preprocessing.normalise(read), np.array([*pixels], int), len(files), claims.trouble, canonical)
