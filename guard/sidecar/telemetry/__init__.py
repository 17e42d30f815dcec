"""What operators see of a sidecar: metrics, their exposition, and logs."""
