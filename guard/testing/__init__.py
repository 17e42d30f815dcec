"""For tests of programs that speak the Open Inference Protocol: an inference server in the test's own process.

It needs nothing beyond guard's own dependencies, and no model: any function from arrays to arrays will do.
"""

from guard.testing.faults import Call, Fault
from guard.testing.server import InferenceServer

__all__ = ["Call", "Fault", "InferenceServer"]
