"""What attacks are tried on: the same sidecars and servers as in the integration tests."""

from tests.integration.sidecar.conftest import (
    classify,
    clean,
    launch,
    running_upstream,
    served_profile,
    triggered,
    upstream,
)

__all__ = ["classify", "clean", "launch", "running_upstream", "served_profile", "triggered", "upstream"]
