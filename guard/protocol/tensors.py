"""Between protocol messages and arrays. Requests are untrusted: everything is checked before it is used."""

import math
import struct
from collections.abc import Sequence

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse

InputTensor = ModelInferRequest.InferInputTensor
OutputTensor = ModelInferResponse.InferOutputTensor


def parse_request(data: bytes) -> ModelInferRequest:
    """Parse a request.

    Raises:
        RequestError: The bytes are no ModelInferRequest.
    """
    try:
        return ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise RequestError("the message is not a ModelInferRequest") from error


SHARED_MEMORY = "shared_memory_region"
"""The parameter of a tensor that lies in shared memory (an extension of Triton's)."""


def uses_shared_memory(request: ModelInferRequest) -> bool:
    """Whether an input comes from, or an output goes to, memory that guard does not see."""
    return any(SHARED_MEMORY in tensor.parameters for tensor in request.inputs) or any(
        SHARED_MEMORY in tensor.parameters for tensor in request.outputs
    )


def find_input(request: ModelInferRequest, name: str) -> tuple[InputTensor, bytes | None]:
    """The input tensor with the images, and its raw contents if the request uses the raw form.

    Args:
        request: Parsed request.
        name: Of the input; a request with one input only may call it as it likes.

    Raises:
        RequestError: The input is missing, is there twice, lies in shared memory, or mixes raw and typed contents.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(raw)} raw contents for {len(request.inputs)} inputs")
    if sum(tensor.name == name for tensor in request.inputs) > 1:
        # An upstream server might take the other one, which nobody checked.
        raise RequestError(f"the input {name!r} is there more than once")
    for index, tensor in enumerate(request.inputs):
        if tensor.name == name or len(request.inputs) == 1:
            if SHARED_MEMORY in tensor.parameters:
                raise RequestError(f"input {tensor.name!r} lies in shared memory, which guard cannot see")
            if raw and tensor.HasField("contents"):
                raise RequestError(f"input {tensor.name!r} has both raw and typed contents")
            return tensor, raw[index] if raw else None
    raise RequestError(f"there is no input {name!r}; the request has {[t.name for t in request.inputs][:8]}")


def float_images(
    tensor: InputTensor, raw: bytes | None, shape: tuple[int, int, int], max_batch: int
) -> NDArray[np.float32]:
    """Preprocessed images: float32, shape [N, 3, H, W].

    Args:
        tensor: An FP32 input.
        raw: Its raw contents, if any.
        shape: Channels, height and width that the model takes.
        max_batch: Largest N.

    Raises:
        RequestError: Wrong datatype, shape or length, or a value that is not finite.
    """
    if tensor.datatype != "FP32":
        raise RequestError(
            f"input {tensor.name!r} is {tensor.datatype[:16]!r}; FP32 images or BYTES files are expected"
        )
    dims = tuple(tensor.shape)
    if len(dims) != 4 or dims[1:] != shape or not 1 <= dims[0] <= max_batch:
        raise RequestError(
            f"input {tensor.name!r} has shape {list(dims)[:8]}; [N, {', '.join(str(d) for d in shape)}] is expected, "
            f"N from 1 to {max_batch}"
        )
    count = math.prod(dims)
    if raw is not None:
        if len(raw) != 4 * count:
            raise RequestError(f"input {tensor.name!r} has {len(raw)} bytes; its shape needs {4 * count}")
        values = np.frombuffer(raw, dtype="<f4")
    else:
        if len(tensor.contents.fp32_contents) != count:
            raise RequestError(
                f"input {tensor.name!r} has {len(tensor.contents.fp32_contents)} values; its shape needs {count}"
            )
        values = np.fromiter(tensor.contents.fp32_contents, dtype=np.float32, count=count)
    if not np.isfinite(values).all():
        raise RequestError(f"input {tensor.name!r} holds a value that is not finite (NaN or infinity)")
    return values.reshape(dims)


def encoded_images(tensor: InputTensor, raw: bytes | None, max_batch: int) -> list[bytes]:
    """Encoded image files of a BYTES input of shape [N] or [N, 1].

    Raises:
        RequestError: Wrong shape or count, or a damaged raw form.
    """
    dims = tuple(tensor.shape)
    if not (len(dims) == 1 or (len(dims) == 2 and dims[1] == 1)) or not 1 <= dims[0] <= max_batch:
        raise RequestError(
            f"input {tensor.name!r} has shape {list(dims)[:8]}; [N] is expected for BYTES, N from 1 to {max_batch}"
        )
    files = unpack_bytes(raw) if raw is not None else list(tensor.contents.bytes_contents)
    if len(files) != dims[0]:
        raise RequestError(f"input {tensor.name!r} has {len(files)} elements; its shape needs {dims[0]}")
    return files


def unpack_bytes(raw: bytes) -> list[bytes]:
    """The elements of a raw BYTES tensor: each four bytes of length, little-endian, then the bytes.

    Raises:
        RequestError: The lengths do not fit.
    """
    elements, position = [], 0
    while position < len(raw):
        start = position + 4
        length = struct.unpack_from("<I", raw, position)[0] if start <= len(raw) else len(raw)
        if start + length > len(raw):
            raise RequestError("a BYTES tensor is damaged: an element is longer than the tensor")
        elements.append(raw[start : start + length])
        position = start + length
    return elements


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """The inverse of `unpack_bytes`."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def add_output(
    response: ModelInferResponse, name: str, values: NDArray[np.float32] | Sequence[bytes], *, raw: bool
) -> None:
    """Append an output: FP32 for an array, BYTES for a sequence of bytes; raw or typed, never a mixture."""
    tensor = response.outputs.add(name=name)
    if isinstance(values, np.ndarray):
        tensor.datatype = "FP32"
        tensor.shape.extend(values.shape)
        if raw:
            response.raw_output_contents.append(np.ascontiguousarray(values, dtype="<f4").tobytes())
        else:
            tensor.contents.fp32_contents.extend(values.ravel().tolist())
    else:
        tensor.datatype = "BYTES"
        tensor.shape.append(len(values))
        if raw:
            response.raw_output_contents.append(pack_bytes(values))
        else:
            tensor.contents.bytes_contents.extend(values)


def float_output(response: ModelInferResponse, name: str) -> NDArray[np.float32] | None:
    """An FP32 output as an array; None if there is none of that name, or it is not well formed."""
    for index, tensor in enumerate(response.outputs):
        if tensor.name != name:
            continue
        count = math.prod(tensor.shape)
        # Without dimensions there are no rows, and two negative ones have a positive product.
        if tensor.datatype != "FP32" or not tensor.shape or min(tensor.shape) < 1:
            return None
        if response.raw_output_contents:
            if index >= len(response.raw_output_contents) or len(response.raw_output_contents[index]) != 4 * count:
                return None
            return np.frombuffer(response.raw_output_contents[index], dtype="<f4").reshape(tuple(tensor.shape))
        if len(tensor.contents.fp32_contents) != count:
            return None
        return np.fromiter(tensor.contents.fp32_contents, np.float32, count).reshape(tuple(tensor.shape))
    return None


def remove_output(response: ModelInferResponse, name: str) -> bool:
    """Take an output out of a reply, with its raw contents; whether it was there."""
    for index, tensor in enumerate(response.outputs):
        if tensor.name == name:
            del response.outputs[index]
            if index < len(response.raw_output_contents):
                del response.raw_output_contents[index]
            return True
    return False


def with_output(data: bytes, name: str) -> bytes:
    """A request with one more output in its list: two messages one after the other are one, merged."""
    asked = ModelInferRequest()
    asked.outputs.add(name=name)
    return data + asked.SerializeToString()
