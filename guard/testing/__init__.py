"""An inference server for tests of programs that speak the Open Inference Protocol, in the test's own process.

It needs no dependency besides those of guard, and no model: any function from arrays to arrays will do.
"""

from guard.testing.faults import Call, Fault
from guard.testing.server import InferenceServer

__all__ = ["Call", "Fault", "InferenceServer"]
