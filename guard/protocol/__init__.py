"""The wire: messages of the Open Inference Protocol v2 and of guard.v1, their tensors, and the dialects of streams."""

__all__ = ["DESCRIBING_METHODS", "MODEL_CONTROL", "SERVICE"]

SERVICE = "inference.GRPCInferenceService"
"""Full name of the Open Inference Protocol's gRPC service."""
DESCRIBING_METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
"""The methods of the service that describe a server and its models; each takes and returns one message."""
MODEL_CONTROL = ("RepositoryModelLoad", "RepositoryModelUnload")
"""The methods that change which models a server has (an extension of the protocol)."""
