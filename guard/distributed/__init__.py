"""Many independent tasks, on this machine's processes or on a Ray cluster, through one interface.

A task is a function and one argument, both of which can be pickled. Its results are whatever it returns and the files
that it writes; each task must give the same when it is run again. What is computed does not depend on the engine: it
only says where.
"""

from guard.distributed.choice import engine
from guard.distributed.engine import Engine, Lost, Processes, Serial

__all__ = ["Engine", "Lost", "Processes", "Serial", "engine"]
