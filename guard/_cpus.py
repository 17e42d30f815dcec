"""How many processors this process may use, which in a container is fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_PROCESS, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """The number of processors that the scheduler and the quotas of all control groups leave this process; at least 1.

    A quota of a part of a processor counts as a whole one.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        allowed = os.cpu_count() or 1
    return max(1, min((allowed, *(math.ceil(quota) for quota in _quotas(_PROCESS, _ROOT)))))


def _quotas(process: Path, root: Path) -> Iterator[float]:
    """The quotas, in processors, of the groups of a process and of those above them.

    Args:
        process: The file that lists the groups, one a line: number, controllers, path.
        root: Where control groups are mounted.
    """
    lines: list[str] = []
    with suppress(OSError, ValueError):
        lines = process.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container, the path may be that of the host, and what is mounted its end: the mount's own root is looked
        # at in any case.
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if ".." in group.parts:
                continue
            if not controllers:
                yield from _quota_2(root / group / "cpu.max")
            else:
                for mount in (controllers, "cpu"):
                    yield from _quota_1(root / mount / group)


def _quota_2(file: Path) -> Iterator[float]:
    """The quota in a file of version 2: quota or `max`, and period, in microseconds."""
    with suppress(OSError, ValueError):
        quota, period = file.read_text(encoding="ascii").split()
        yield from _processors(quota, period)


def _quota_1(group: Path) -> Iterator[float]:
    """The quota of a group of version 1, where −1 stands for none."""
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        yield from _processors(quota, period)


def _processors(quota: str, period: str) -> Iterator[float]:
    if quota.strip() != "max" and int(quota) > 0 and int(period) > 0:
        yield int(quota) / int(period)
