"""Addresses, ports, TLS and event loops: how a sidecar is reached, and how it reaches others."""
