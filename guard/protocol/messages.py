"""Inference requests and replies as messages: what is done with them without reading a tensor."""

import struct
from collections.abc import Iterable, Sequence

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-not-found] # missing from the stubs

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse

SHARED_MEMORY = "shared_memory_region"
"""The parameter of a tensor that lies in shared memory (an extension of Triton)."""


RAW_SIZE = "binary_data_size"
"""The parameter by which KServe's client tells how many bytes the raw contents of a tensor have."""
OWN_PREFIX = "guard_"
"""Beginning of the names of the parameters and outputs that guard itself writes; nobody else's reach the other side."""


def parse_request(data: bytes) -> ModelInferRequest:
    """Parse a request.

    Raises:
        RequestError: The bytes are not a ModelInferRequest, or have fields that it does not have: what they mean to the
            server that the request is for, guard cannot know.
    """
    request = ModelInferRequest()
    if not parse_whole(request, data):
        raise RequestError("the message is not a ModelInferRequest, or has fields that the protocol does not have")
    return request


def parse_whole(message: Message, data: bytes) -> bool:
    """Parse bytes into a message; return whether they are such a message and have no unknown field, at any depth."""
    try:
        message.ParseFromString(data)
    except DecodeError:
        return False
    return not _has_unknown_fields(message)


def _has_unknown_fields(message: Message) -> bool:
    """Whether a message, or one in it, has fields that its type does not have; no tensor is copied for that."""
    if len(UnknownFieldSet(message)):
        return True
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        several = value.values() if hasattr(value, "values") else value if hasattr(value, "add") else (value,)
        if any(_has_unknown_fields(inner) for inner in several):
            return True
    return False


def remove_own_names(message: ModelInferRequest | ModelInferResponse) -> bool:
    """Remove every parameter, and every output of a reply, that has a name of guard's own.

    Args:
        message: A request or a reply, which is changed.

    Returns:
        Whether the message was changed.
    """
    changed = False
    tensors = message.inputs if isinstance(message, ModelInferRequest) else ()
    for parameters in (message.parameters, *(each.parameters for each in (*tensors, *message.outputs))):
        for name in [name for name in parameters if name.startswith(OWN_PREFIX)]:
            del parameters[name]
            changed = True
    if isinstance(message, ModelInferResponse):
        for name in [output.name for output in message.outputs if output.name.startswith(OWN_PREFIX)]:
            changed |= remove_output(message, name)
    return changed


def with_elements(request: ModelInferRequest, index: int, files: Sequence[bytes]) -> bytes:
    """A serialised request with other files or texts in its BYTES input, which becomes the first of its inputs.

    Args:
        request: A request.
        index: The number of the BYTES input.
        files: What is put in place of each of its elements.
    """
    moved = [index, *(other for other in range(len(request.inputs)) if other != index)]
    new = ModelInferRequest(model_name=request.model_name, model_version=request.model_version, id=request.id)
    for name, value in request.parameters.items():
        new.parameters[name].CopyFrom(value)
    new.outputs.extend(request.outputs)
    raw = request.raw_input_contents
    packed = pack_bytes(files) if raw else b""
    for place in moved:
        if place != index:
            new.inputs.append(request.inputs[place])
        else:
            old = request.inputs[index]
            tensor = new.inputs.add(name=old.name, datatype=old.datatype, shape=old.shape)
            for name, value in old.parameters.items():
                tensor.parameters[name].CopyFrom(value)
            if not raw:
                tensor.contents.bytes_contents.extend(files)
            elif RAW_SIZE in tensor.parameters:
                tensor.parameters[RAW_SIZE].int64_param = len(packed)
        if raw:
            new.raw_input_contents.append(packed if place == index else raw[place])
    return bytes(new.SerializeToString())


def pack_bytes(elements: Iterable[bytes]) -> bytes:
    """The raw contents of a BYTES tensor: each element is preceded by its length in four bytes, little-endian."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def uses_shared_memory(request: ModelInferRequest) -> bool:
    """Whether an input is read from, or an output is written to, memory that guard does not see."""
    return any(SHARED_MEMORY in tensor.parameters for tensor in request.inputs) or any(
        SHARED_MEMORY in tensor.parameters for tensor in request.outputs
    )


def with_output(data: bytes, name: str) -> bytes:
    """A serialised request with one more output in its list: protobuf merges two messages that follow each other."""
    asked = ModelInferRequest()
    asked.outputs.add(name=name)
    return data + asked.SerializeToString()


def remove_output(response: ModelInferResponse, name: str) -> bool:
    """Remove an output, with its raw contents, from a reply; return whether the reply had it."""
    names = [output.name for output in response.outputs]
    if name not in names:
        return False
    index = names.index(name)
    del response.outputs[index]
    if index < len(response.raw_output_contents):
        del response.raw_output_contents[index]
    return True
