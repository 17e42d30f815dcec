"""The process: ports, health, limits, admin service, several processes, start and drain."""
