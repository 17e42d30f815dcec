"""Checks of an installation, of a configuration before the start, and of the ways around a sidecar.

Only the findings are imported here, so that a broken installation can be reported too.
"""

from guard.diagnostics.findings import Finding, Status

__all__ = ["Finding", "Status"]
