"""Tensors of the protocol as arrays, and back. Requests are untrusted: everything is checked before it is used."""

import math
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.protocol.messages import SHARED_MEMORY

InputTensor: TypeAlias = ModelInferRequest.InferInputTensor
OutputTensor: TypeAlias = ModelInferResponse.InferOutputTensor

_TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Fields of typed contents, by datatype; FP16 exists in raw form only."""
_DTYPES = {
    "BOOL": np.dtype("?"),
    **{
        f"{sign}INT{8 * size}": np.dtype(f"<{sign.lower() or 'i'}{size}") for sign in ("", "U") for size in (1, 2, 4, 8)
    },
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_DATATYPES = {dtype.newbyteorder("="): name for name, dtype in _DTYPES.items()}


def find_input(request: ModelInferRequest, name: str) -> tuple[InputTensor, bytes | None]:
    """Find the input tensor with the images.

    Args:
        request: A parsed request.
        name: Name of the input; if a request has only one input, that may have any name.

    Returns:
        The tensor, and its raw contents if the request has the raw form.

    Raises:
        RequestError: The input is missing, is there twice, lies in shared memory, or mixes raw and typed contents.
    """
    _check_raw_contents(request)
    if sum(tensor.name == name for tensor in request.inputs) > 1:
        # An upstream server might take the other one, which was not checked.
        raise RequestError(f"the input {name!r} is there more than once")
    for index, tensor in enumerate(request.inputs):
        if tensor.name == name or len(request.inputs) == 1:
            return tensor, _raw_contents(request, index)
    raise RequestError(f"there is no input {name!r}; the request has {[t.name for t in request.inputs][:8]}")


def float_images(
    tensor: InputTensor, raw: bytes | None, shape: tuple[int, int, int], max_batch: int
) -> NDArray[np.float32]:
    """Read preprocessed images: float32, shape [N, 3, H, W].

    Args:
        tensor: An FP32 input.
        raw: Its raw contents, if any.
        shape: Channels, height and width that the model expects.
        max_batch: The largest N.

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
    values = _numbers(tensor, raw, math.prod(dims))
    if not np.isfinite(values).all():
        raise RequestError(f"input {tensor.name!r} holds a value that is not finite (NaN or infinity)")
    return values.reshape(dims)


def encoded_images(tensor: InputTensor, raw: bytes | None, max_batch: int) -> list[bytes]:
    """Read encoded image files from a BYTES input of shape [N] or [N, 1].

    Args:
        tensor: A BYTES input.
        raw: Its raw contents, if any.
        max_batch: The largest N.

    Raises:
        RequestError: Wrong shape or number of elements, or damaged raw contents.
    """
    dims = tuple(tensor.shape)
    if not (len(dims) == 1 or (len(dims) == 2 and dims[1] == 1)) or not 1 <= dims[0] <= max_batch:
        raise RequestError(
            f"input {tensor.name!r} has shape {list(dims)[:8]}; [N] is expected for BYTES, N from 1 to {max_batch}"
        )
    return _elements(tensor, raw, dims[0])


def read_inputs(request: ModelInferRequest) -> dict[str, NDArray[Any]]:
    """Read all inputs of a request, by name; BYTES become arrays of bytes objects.

    Raises:
        RequestError: Raw and typed contents are mixed, or a tensor is damaged, in shared memory, or of an unknown type.
    """
    _check_raw_contents(request)
    return {tensor.name: _array(tensor, _raw_contents(request, index)) for index, tensor in enumerate(request.inputs)}


def float_output(response: ModelInferResponse, name: str) -> NDArray[np.float32] | None:
    """Read an FP32 output; None if the reply has no output of that name, or the output is malformed."""
    for index, tensor in enumerate(response.outputs):
        if tensor.name != name:
            continue
        # Without dimensions there are no rows, and two negative dimensions have a positive product.
        if tensor.datatype != "FP32" or not tensor.shape or min(tensor.shape) < 1:
            return None
        raw = None
        if response.raw_output_contents:
            if index >= len(response.raw_output_contents):
                return None
            raw = response.raw_output_contents[index]
        try:
            values = _numbers(tensor, raw, math.prod(tensor.shape))
        except RequestError:
            return None
        return values.reshape(tuple(tensor.shape))
    return None


def add_output(
    response: ModelInferResponse,
    name: str,
    values: NDArray[Any] | Sequence[bytes],
    *,
    raw: bool,
    shape: Sequence[int] | None = None,
) -> None:
    """Append an output to a reply, in raw or in typed form.

    Args:
        response: The reply.
        name: Name of the output.
        values: An array of numbers; or a sequence of bytes, or an array of strings, bytes or objects, for BYTES.
        raw: Whether the contents are raw; the outputs of a reply must all have the same form.
        shape: A shape to claim instead of the shape of the values.

    Raises:
        TypeError: The protocol has no datatype for the array, or none in typed form.
    """
    array = values if isinstance(values, np.ndarray) else None
    own_shape = (len(values),) if array is None else array.shape
    tensor = response.outputs.add(name=name, shape=own_shape if shape is None else shape)
    if array is None or array.dtype.kind in "OSU":
        tensor.datatype = "BYTES"
        items = values if array is None else array.ravel().tolist()
        elements = [item.encode() if isinstance(item, str) else bytes(item) for item in items]
        if raw:
            response.raw_output_contents.append(pack_bytes(elements))
        else:
            tensor.contents.bytes_contents.extend(elements)
        return
    datatype = _DATATYPES.get(array.dtype.newbyteorder("="))
    if datatype is None or not (raw or datatype in _TYPED_FIELDS):
        raise TypeError(f"output {name!r} has the dtype {array.dtype}, which the protocol cannot carry")
    tensor.datatype = datatype
    if raw:
        response.raw_output_contents.append(array.astype(_DTYPES[datatype]).tobytes())
    else:
        getattr(tensor.contents, _TYPED_FIELDS[datatype]).extend(array.ravel().tolist())


def unpack_bytes(raw: bytes) -> list[bytes]:
    """The elements of a raw BYTES tensor: each is preceded by its length in four bytes, little-endian.

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


def _check_raw_contents(request: ModelInferRequest) -> None:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(raw)} raw contents for {len(request.inputs)} inputs")


def _raw_contents(request: ModelInferRequest, index: int) -> bytes | None:
    """The raw contents of an input; None if the request has the typed form."""
    tensor, raw = request.inputs[index], request.raw_input_contents
    if SHARED_MEMORY in tensor.parameters:
        raise RequestError(f"input {tensor.name!r} lies in shared memory, which guard cannot see")
    if raw and tensor.HasField("contents"):
        raise RequestError(f"input {tensor.name!r} has both raw and typed contents")
    return raw[index] if raw else None


def _array(tensor: InputTensor, raw: bytes | None) -> NDArray[Any]:
    """An input of any datatype that numpy has."""
    name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    if datatype not in _TYPED_FIELDS and (datatype != "FP16" or raw is None):
        raise RequestError(f"input {name!r} has the datatype {datatype!r}, which cannot be read")
    if min(shape, default=0) < 0:
        raise RequestError(f"input {name!r} has the shape {list(shape)}, which no tensor has")
    count = math.prod(shape)
    if datatype != "BYTES":
        return _numbers(tensor, raw, count).reshape(shape).copy()
    values = np.empty(count, object)
    values[:] = _elements(tensor, raw, count)
    return values.reshape(shape)


def _numbers(tensor: InputTensor | OutputTensor, raw: bytes | None, count: int) -> NDArray[Any]:
    """The values of a tensor of numbers, shape [count]; read-only if they are raw."""
    dtype = _DTYPES[tensor.datatype]
    if raw is not None:
        if len(raw) != dtype.itemsize * count:
            raise RequestError(f"input {tensor.name!r} has {len(raw)} bytes; its shape needs {dtype.itemsize * count}")
        return np.frombuffer(raw, dtype)
    contents = getattr(tensor.contents, _TYPED_FIELDS[tensor.datatype])
    if len(contents) != count:
        raise RequestError(f"input {tensor.name!r} has {len(contents)} values; its shape needs {count}")
    return np.fromiter(contents, dtype, count)


def _elements(tensor: InputTensor, raw: bytes | None, count: int) -> list[bytes]:
    """The elements of a BYTES tensor."""
    elements = list(tensor.contents.bytes_contents) if raw is None else unpack_bytes(raw)
    if len(elements) != count:
        raise RequestError(f"input {tensor.name!r} has {len(elements)} elements; its shape needs {count}")
    return elements
