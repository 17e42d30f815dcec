"""The wire: messages of the Open Inference Protocol v2 and of guard.v1, their tensors, and the dialects of streams."""

__all__ = ["SERVICE"]

SERVICE = "inference.GRPCInferenceService"
"""Full name of the Open Inference Protocol's gRPC service."""
