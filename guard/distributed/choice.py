"""The engine that a user asks for."""

from guard.distributed.engine import Engine, Processes, Serial


def engine(jobs: int = 1, ray: str | None = None) -> Engine:
    """The engine that a command's options ask for.

    Args:
        jobs: Number of processes on this machine.
        ray: Address of a Ray cluster, or `auto` for the one that this machine belongs to; None for none.

    Raises:
        MissingDependencyError: Ray is wanted and not installed.
        UsageError: No cluster answers at this address.
    """
    if ray is not None:
        from guard.distributed.ray import Ray

        return Ray.connect(ray)
    return Processes(jobs) if jobs > 1 else Serial()
