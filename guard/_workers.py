"""Worker processes that do not outlive the program."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def workers(count: int, threads: int) -> ProcessPoolExecutor:
    """A pool of processes, each of which uses `threads` CPU threads for torch.

    They are spawned, not forked: a forked process cannot use a GPU that its parent used. They end when the program
    does, even if it was killed and could not stop them.
    """
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
