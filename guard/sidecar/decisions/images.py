"""Reading of the images of a request."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers import Preprocessing, decode, decode_unambiguous, encode
from guard.classifiers.headers import read_headers
from guard.errors import ImageError, RequestError
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import with_images
from guard.protocol.tensors import encoded_images, find_input, float_images, raw_contents
from guard.sidecar.decisions.workers import LargeWorkError, checkpoint
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.settings import Settings

T = TypeVar("T")
LARGE_PIXELS = 16_000_000
"""Requests with more pixels to decode are large: not every thread takes them. A camera's picture is still below."""


@dataclass(frozen=True, eq=False)
class Claims:
    """What a request claims to hold, before anything is decoded.

    Attributes:
        index: Number of the input with the images.
        where: How errors name that input.
        files: The encoded images; None if the images are preprocessed.
        work: Pixels that decoding them visits.
        troubles: Why images cannot be read, by their numbers; completed while they are decoded.
    """

    index: int
    where: str
    files: list[bytes] | None
    work: int
    troubles: dict[int, ImageError]

    @property
    def trouble(self) -> str:
        """Why the first of the images that cannot be read cannot be; "" if all can."""
        if not self.troubles:
            return ""
        first = min(self.troubles)
        which = f"image {first} of the batch: " if self.files is not None and len(self.files) > 1 else ""
        return f"{self.where}{which}{self.troubles[first]}"

    def in_turn(self, rest: Callable[[], T]) -> T:
        """Do what is left to do, now or, if decoding takes long, when a thread for large work is free."""
        if self.work > LARGE_PIXELS:
            raise LargeWorkError(rest)
        return rest()


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a request that can be read.

    Attributes:
        values: Preprocessed, shape [M, 3, S, S].
        rows: Their numbers in the request, shape [M].
        count: Number of images in the request.
        trouble: Why the first of the others cannot be read; "" if there is none.
        canonical: The request as it is forwarded; None if that is as it was sent.
    """

    values: Floats
    rows: NDArray[np.int64]
    count: int
    trouble: str
    canonical: bytes | None = None

    def of(self, rows: NDArray[np.int64]) -> Floats:
        """The values of the images with these numbers; all of them must be there."""
        return self.values if len(rows) == len(self.rows) else self.values[np.isin(self.rows, rows)]


class Reader:
    """Reads the images of the requests of one model.

    Args:
        preprocessing: Preprocessing of the model.
        settings: Settings of the model.
        limits: Settings of the sidecar.
    """

    def __init__(self, preprocessing: Preprocessing, settings: ModelSettings, limits: Settings) -> None:
        self._preprocessing, self._settings, self._limits = preprocessing, settings, limits

    def find_images(self, request: ModelInferRequest) -> int:
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
        index, limits = self.find_images(request), self._limits
        tensor, raw = request.inputs[index], raw_contents(request, index)
        where = f"input {tensor.name[:128]!r}: "
        if tensor.datatype != "BYTES":
            return Claims(index, where, None, 0, {})
        files = encoded_images(tensor, raw, limits.max_batch)
        try:
            work, troubles = read_headers(files, max_pixels=limits.max_pixels, max_work=limits.max_request_pixels)
        except ImageError as error:
            raise RequestError(f"{where}{error}") from error
        return Claims(index, where, files, work, troubles)

    def read(
        self,
        request: ModelInferRequest,
        claims: Claims,
        *,
        replaced: bool,
        ambiguous: bool,
        only: Collection[int] | None = None,
    ) -> Images:
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
                return Images(values, np.arange(len(values)), len(values), "")
            finite, trouble = np.isfinite(values).all(axis=(1, 2, 3)), "a value is not finite (NaN or infinity)"
            trouble = f"{claims.where}{trouble}"
            return Images(values[finite], np.flatnonzero(finite), len(values), trouble)
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
            canonical = with_images(request, claims.index, sent)
        return Images(preprocessing.normalise(read), np.array([*pixels], int), len(files), claims.trouble, canonical)
