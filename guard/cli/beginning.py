"""What must be so from the first moment of the program, before it has loaded anything that takes time.

The first process of a container gets no signal that it does not handle: a pod that is deleted while its program starts
would run on until it is killed. And a sidecar must not end at SIGHUP, which asks it to read its files again.

Libraries that compute start as many threads as the machine has processors, whatever its container may use: with a quota
of one processor of many, each of them then waits for the others.
"""

import os
import signal
import sys

from guard._cpus import usable_cpus

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which torch, numpy and what they stand on are told a number of threads, before they are loaded."""


def begin(arguments: list[str], process: int) -> None:
    """Set the signals, leave out what is not meant for a sidecar, and start no more threads than there are processors.

    Args:
        arguments: The words behind the program's name.
        process: Id of this process.
    """
    if process == 1:
        # What a command handles itself later replaces this.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    if arguments[:1] == ["serve"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Meant for other programs: prometheus_client would keep the metrics in files there, across restarts.
        for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
            os.environ.pop(name, None)
    usable = usable_cpus()
    if usable < (os.cpu_count() or 1) and not any(os.environ.get(name) for name in _THREADS):
        os.environ.update(dict.fromkeys(_THREADS, str(usable)))


begin(sys.argv[1:], os.getpid())
