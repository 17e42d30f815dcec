"""Ports, channels, TLS and event loops: how clients reach a sidecar, and how it reaches the upstream server."""
