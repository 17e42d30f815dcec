"""Between the protocol's tensors and arrays, for every datatype that numpy has."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.protocol.tensors import pack_bytes, unpack_bytes

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
"""Where typed contents lie; FP16 exists in raw form only."""
_DTYPES = {
    "BOOL": np.dtype("?"),
    **{
        f"{sign}INT{8 * size}": np.dtype(f"<{sign.lower() or 'i'}{size}") for sign in ("", "U") for size in (1, 2, 4, 8)
    },
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_DATATYPES = {dtype.newbyteorder("="): name for name, dtype in _DTYPES.items()}


def read_inputs(request: ModelInferRequest) -> dict[str, NDArray[Any]]:
    """The inputs of a request by name; BYTES as arrays of bytes objects.

    Raises:
        RequestError: Raw and typed contents are mixed, or a tensor is damaged, in shared memory, or of an unknown type.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(raw)} raw contents for {len(request.inputs)} inputs")
    inputs = {}
    for index, tensor in enumerate(request.inputs):
        if "shared_memory_region" in tensor.parameters:
            raise RequestError(f"input {tensor.name!r} lies in shared memory, which this server does not have")
        if raw and tensor.HasField("contents"):
            raise RequestError(f"input {tensor.name!r} has both raw and typed contents")
        inputs[tensor.name] = _read(tensor, raw[index] if raw else None)
    return inputs


def _read(tensor: ModelInferRequest.InferInputTensor, raw: bytes | None) -> NDArray[Any]:
    name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    if datatype not in _TYPED_FIELDS and (datatype != "FP16" or raw is None):
        raise RequestError(f"input {name!r} has the datatype {datatype!r}, which this server does not read")
    if min(shape, default=0) < 0:
        raise RequestError(f"input {name!r} has the shape {list(shape)}, which no tensor has")
    values: NDArray[Any]
    if datatype == "BYTES":
        elements = tensor.contents.bytes_contents if raw is None else unpack_bytes(raw)
        values = np.empty(len(elements), object)
        values[:] = list(elements)
    elif raw is None:
        values = np.array(getattr(tensor.contents, _TYPED_FIELDS[datatype]), _DTYPES[datatype])
    elif len(raw) % _DTYPES[datatype].itemsize:
        raise RequestError(f"input {name!r} has {len(raw)} bytes, which is no whole number of {datatype} values")
    else:
        values = np.frombuffer(raw, _DTYPES[datatype]).copy()
    if len(values) != math.prod(shape):
        raise RequestError(f"input {name!r} has {len(values)} values; its shape {list(shape)} needs {math.prod(shape)}")
    return values.reshape(shape)


def write_outputs(
    response: ModelInferResponse,
    outputs: Mapping[str, NDArray[Any]],
    *,
    raw: bool,
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Append outputs; raw or typed, never a mixture.

    Args:
        response: Written to.
        outputs: Arrays by name; those of strings, bytes or objects become BYTES.
        raw: Which form.
        shapes: Claimed instead of an array's own shape, by name.

    Raises:
        TypeError: The protocol has no datatype for an array, or none in typed form.
    """
    for name, array in outputs.items():
        values = np.asarray(array)
        tensor = response.outputs.add(name=name, shape=shapes.get(name, values.shape))
        if values.dtype.kind in "OSU":
            tensor.datatype = "BYTES"
            elements = [item.encode() if isinstance(item, str) else bytes(item) for item in values.ravel().tolist()]
            if raw:
                response.raw_output_contents.append(pack_bytes(elements))
            else:
                tensor.contents.bytes_contents.extend(elements)
            continue
        datatype = _DATATYPES.get(values.dtype.newbyteorder("="))
        if datatype is None or not (raw or datatype in _TYPED_FIELDS):
            raise TypeError(f"output {name!r} has the dtype {values.dtype}, which the protocol cannot carry")
        tensor.datatype = datatype
        if raw:
            response.raw_output_contents.append(values.astype(_DTYPES[datatype]).tobytes())
        else:
            getattr(tensor.contents, _TYPED_FIELDS[datatype]).extend(values.ravel().tolist())
