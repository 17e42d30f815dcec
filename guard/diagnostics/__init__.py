"""Checks of an installation, of a configuration before it serves, and of the ways around a sidecar.

Nothing but the findings is imported here, so that a broken installation can be reported too.
"""

from guard.diagnostics.findings import Finding, Status

__all__ = ["Finding", "Status"]
