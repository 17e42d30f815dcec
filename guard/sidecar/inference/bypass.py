"""Ways around screening that an upstream server may offer, and which of them are open."""

from google.protobuf.message import DecodeError
from grpc import StatusCode

from guard.protocol.inference_pb2 import RepositoryModelLoadRequest
from guard.sidecar.inference.service import RefusedError

MODEL_CONTROL = frozenset({"RepositoryModelLoad", "RepositoryModelUnload"})
"""Methods that change which model answers. Triton, KServe and MLServer have them in the service of inferences, MLServer
in a second service too; they are known by their names, in whatever service."""
SHARED_MEMORY = frozenset({"SystemSharedMemoryRegister", "CudaSharedMemoryRegister"})
"""Methods that make memory known from which inputs can be taken, and to which outputs can go, unseen."""
OTHER_PROTOCOLS = frozenset(
    {
        "org.pytorch.serve.grpc.inference.InferenceAPIsService",
        "tensorflow.serving.PredictionService",
        "tensorflow.serving.SessionService",
    }
)
"""Services of other inference protocols, which servers of this one may speak on the same port."""


def check_model_control(data: bytes, *, allowed: bool) -> None:
    """Refuse to load or unload a model where that is not allowed, and always with a model that the client sends.

    Triton takes a configuration (`config`) and files (`file:…`) as parameters of the call: any model, under any name.

    Args:
        data: The request.
        allowed: By the operator, with `allow_model_control`.

    Raises:
        RefusedError: With PERMISSION_DENIED; or the message cannot be read.
    """
    if not allowed:
        raise RefusedError(
            StatusCode.PERMISSION_DENIED,
            "guard: models are not loaded or unloaded through this sidecar; its operator can allow it with "
            "allow_model_control",
        )
    try:
        parameters = RepositoryModelLoadRequest.FromString(data).parameters
    except DecodeError as error:
        raise RefusedError(StatusCode.INVALID_ARGUMENT, "guard: not a RepositoryModelLoadRequest") from error
    if any(name == "config" or name.startswith("file:") for name in parameters):
        raise RefusedError(
            StatusCode.PERMISSION_DENIED,
            "guard: a model that comes with the request, as config or file: parameters, was never vetted; it is not "
            "loaded through this sidecar",
        )
