"""Hours of a sidecar in minutes: a mixture of good and bad requests, and restarts under load."""
