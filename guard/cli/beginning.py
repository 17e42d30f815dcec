"""What must be so from the first moment of the program, before it has loaded anything that takes time.

The first process of a container gets no signal that it does not handle: a pod that is deleted while its program starts
would run on until it is killed. And a sidecar must not end at SIGHUP, which asks it to read its files again.
"""

import os
import signal
import sys


def begin(arguments: list[str], process: int) -> None:
    """Set the signals.

    Args:
        arguments: The words behind the program's name.
        process: Id of this process.
    """
    if process == 1:
        # What a command handles itself later replaces this.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    if arguments[:1] == ["serve"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


begin(sys.argv[1:], os.getpid())
