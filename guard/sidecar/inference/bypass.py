"""Ways around screening that an upstream server may offer, and which of them clients may use."""

from collections.abc import Collection

from google.protobuf.message import DecodeError
from grpc import StatusCode

from guard.errors import RequestError
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import RepositoryModelLoadRequest
from guard.protocol.wire import MODEL_CONTROL, Limits, check_message
from guard.sidecar.inference.calls import RefusedError

SHARED_MEMORY = frozenset({"SystemSharedMemoryRegister", "CudaSharedMemoryRegister"})
"""Methods that register memory from which inputs are read, and to which outputs are written, unseen by guard."""
_HARMLESS = frozenset(
    {
        f"/{SERVICE}/{method}"
        for method in (
            *("RepositoryIndex", "ModelConfig", "ModelStatistics"),
            *(f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Unregister")),
        )
    }
    | {"/inference.model_repository.ModelRepositoryService/RepositoryIndex"}
)
"""Methods of Triton and MLServer that tell something about the server, or give memory back, and start no inference."""


def is_harmless(path: str, allowed: Collection[str]) -> bool:
    """Whether a method may be called although guard cannot read its messages.

    Args:
        path: Path of the method, `/package.Service/Method`.
        allowed: Further paths that the operator allows; a `*` in place of the method stands for any.
    """
    return path in _HARMLESS or path in allowed or f"{path.rpartition('/')[0]}/*" in allowed


def check_model_control(data: bytes, *, allowed: bool) -> None:
    """Refuse a call that loads or unloads a model, unless that is allowed and the client sends no model of its own.

    Triton takes a configuration (`config`) and files (`file:…`) as parameters of the call: any model, under any name.

    Args:
        data: The serialised request.
        allowed: Whether the operator allows such calls, with `allow_model_control`.

    Raises:
        RefusedError: The call is not allowed (PERMISSION_DENIED), or the request cannot be parsed (INVALID_ARGUMENT).
    """
    if not allowed:
        raise RefusedError(
            StatusCode.PERMISSION_DENIED,
            "guard: models are not loaded or unloaded through this sidecar; its operator can allow it with "
            "allow_model_control",
        )
    try:
        check_message(data, MODEL_CONTROL, Limits())
        parameters = RepositoryModelLoadRequest.FromString(data).parameters
    except (DecodeError, RequestError) as error:
        raise RefusedError(StatusCode.INVALID_ARGUMENT, "guard: not a RepositoryModelLoadRequest") from error
    if any(name == "config" or name.startswith("file:") for name in parameters):
        raise RefusedError(
            StatusCode.PERMISSION_DENIED,
            "guard: a model that comes with the request, as config or file: parameters, was never vetted; it is not "
            "loaded through this sidecar",
        )
