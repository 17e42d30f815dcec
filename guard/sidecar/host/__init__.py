"""The process of a sidecar: start and drain, health, limits, admin service, and several processes on one port."""
