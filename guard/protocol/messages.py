"""Inference requests and replies as messages: what is done with them without reading a tensor."""

from google.protobuf.message import DecodeError

from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse

SHARED_MEMORY = "shared_memory_region"
"""The parameter of a tensor that lies in shared memory (an extension of Triton)."""


def parse_request(data: bytes) -> ModelInferRequest:
    """Parse a request.

    Raises:
        RequestError: The bytes are not a ModelInferRequest.
    """
    try:
        return ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise RequestError("the message is not a ModelInferRequest") from error


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
    for index, tensor in enumerate(response.outputs):
        if tensor.name == name:
            del response.outputs[index]
            if index < len(response.raw_output_contents):
                del response.raw_output_contents[index]
            return True
    return False
