"""Tensors of the protocol as arrays, and back. Requests are untrusted: everything is checked before it is used."""

import math
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.protocol.messages import RAW_SIZE, SHARED_MEMORY, pack_bytes

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


PLAIN_PARAMETERS = frozenset(
    {"priority", "sequence_end", "sequence_id", "sequence_start", "timeout", "triton_enable_empty_final_response"}
)
"""Parameters of a request that say when it is answered, and nothing about how its images are read."""
_CONTENT_TYPE, _PLAIN_CONTENT_TYPE = "content_type", "np"
"""The parameter by which MLServer's clients choose how a tensor is read, and its value for an array as it is."""


def find_input(
    request: ModelInferRequest, name: str, *, others: Collection[str] = (), parameters: Collection[str] = ()
) -> int:
    """Find the input with the images, in a request that every server reads in the same way.

    Servers differ in what they do with more than they expect: the first input may be taken whatever its name is, or
    the first contents whatever their datatype, and parameters may choose another way to read them. So a request may
    have one input, or further ones that are known, contents of one form, and known parameters.

    Args:
        request: A parsed request.
        name: Name of the input; if a request has only one input, that may have any name.
        others: Names of the inputs that a request may have beside it.
        parameters: Names of the parameters that the request and its inputs may have besides `PLAIN_PARAMETERS`.

    Returns:
        The number of the input.

    Raises:
        RequestError: The input is missing, or the request can be read in different ways.
    """
    _check_raw_contents(request)
    names = [tensor.name for tensor in request.inputs]
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise RequestError(f"the input {twice[:128]!r} is there more than once")
    index = names.index(name) if name in names else 0
    if not names or (name not in names and (len(names) > 1 or names[0] in others)):
        raise RequestError(f"there is no input {name!r}; the request has {[each[:128] for each in names[:8]]}")
    for place, tensor in enumerate(request.inputs):
        if place != index and tensor.name not in others:
            raise RequestError(
                f"the input {tensor.name[:128]!r} is not known, and the server might read it instead of {name!r}; the "
                "operator can allow it with --other-inputs"
            )
        _check_contents(request, place)
        _check_size(request, place)
        _check_parameters(tensor.parameters, f"input {tensor.name[:128]!r}", {RAW_SIZE, *parameters})
    _check_parameters(request.parameters, "the request", {*PLAIN_PARAMETERS, *parameters})
    return index


def _check_parameters(found: Mapping[str, Any], whose: str, allowed: Collection[str]) -> None:
    for name in found:
        plain = name == _CONTENT_TYPE and found[name].string_param == _PLAIN_CONTENT_TYPE
        if name != SHARED_MEMORY and not plain and name not in allowed:
            raise RequestError(
                f"{whose} has the parameter {name[:128]!r}, which might change how the server reads the images; the "
                "operator can allow it with --pass-parameters"
            )


def _check_size(request: ModelInferRequest, index: int) -> None:
    """Refuse a tensor whose raw contents are said to be of another size than they are."""
    tensor = request.inputs[index]
    if RAW_SIZE not in tensor.parameters:
        return
    raw = raw_contents(request, index)
    if raw is None or tensor.parameters[RAW_SIZE].int64_param != len(raw):
        raise RequestError(f"input {tensor.name[:128]!r} has a {RAW_SIZE} that is not the size of its raw contents")


def _check_contents(request: ModelInferRequest, index: int) -> None:
    """Refuse a tensor with contents of another form than that of its datatype, or in memory that guard cannot see."""
    tensor = request.inputs[index]
    _check_place(request, index)
    if tensor.HasField("contents"):
        found = {field.name for field, _ in tensor.contents.ListFields()} - {_TYPED_FIELDS.get(tensor.datatype)}
        if found:
            raise RequestError(f"input {tensor.name[:128]!r} is {tensor.datatype[:16]!r} and has {min(found)}")


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
        RequestError: Wrong datatype, shape or length. Values may be NaN or infinite.
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
    return values.reshape(dims)


def token_ids(tensor: InputTensor, raw: bytes | None, context: int, max_batch: int) -> NDArray[np.int64]:
    """Read token ids of texts: int64, shape [N, L].

    Args:
        tensor: An INT64 or INT32 input.
        raw: Its raw contents, if any.
        context: The largest L.
        max_batch: The largest N.

    Raises:
        RequestError: Wrong datatype, shape or length. Values may be any.
    """
    if tensor.datatype not in {"INT64", "INT32"}:
        raise RequestError(
            f"input {tensor.name!r} is {tensor.datatype[:16]!r}; BYTES texts, or INT64 or INT32 token ids, are expected"
        )
    dims = tuple(tensor.shape)
    if len(dims) != 2 or not 1 <= dims[0] <= max_batch or not 2 <= dims[1] <= context:
        raise RequestError(
            f"input {tensor.name!r} has shape {list(dims)[:8]}; [N, L] is expected, N from 1 to {max_batch} and L from "
            f"2 to {context}"
        )
    return _numbers(tensor, raw, math.prod(dims)).astype(np.int64).reshape(dims)


def encoded_inputs(tensor: InputTensor, raw: bytes | None, max_batch: int) -> list[bytes]:
    """Read image files or texts from a BYTES input of shape [N] or [N, 1].

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
    return {tensor.name: _array(tensor, raw_contents(request, index)) for index, tensor in enumerate(request.inputs)}


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


def _check_raw_contents(request: ModelInferRequest) -> None:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(raw)} raw contents for {len(request.inputs)} inputs")


def raw_contents(request: ModelInferRequest, index: int) -> bytes | None:
    """The raw contents of an input; None if the request has the typed form.

    Raises:
        RequestError: The input lies in shared memory, or mixes raw and typed contents.
    """
    _check_place(request, index)
    return request.raw_input_contents[index] if request.raw_input_contents else None


def _check_place(request: ModelInferRequest, index: int) -> None:
    tensor = request.inputs[index]
    if SHARED_MEMORY in tensor.parameters:
        raise RequestError(f"input {tensor.name!r} lies in shared memory, which guard cannot see")
    if request.raw_input_contents and tensor.HasField("contents"):
        raise RequestError(f"input {tensor.name!r} has both raw and typed contents")


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
