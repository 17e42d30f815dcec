"""What a sidecar tells the people on call: metrics, their exposition, and logs."""
