"""Threads for work beside the engine's, which give way to it."""

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_NICE = 10
"""Added to the server's own, 19 being the least: it still gets on while every core is busy, at about a tenth of the
engine's share."""


def background_thread(name: str) -> ThreadPoolExecutor:
    """One thread with one torch thread and a low priority: see `open_runtime` on OpenMP pools."""
    return ThreadPoolExecutor(1, name, give_way)


def give_way(threads: int = 1, nice: int = _NICE) -> None:
    """Limit the calling thread to so many torch threads, and lower its priority where threads have one (Linux).

    Threads that it starts inherit that, so it must not start an engine's.
    """
    torch.set_num_threads(threads)
    own = threading.get_native_id()
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, own, min(os.getpriority(os.PRIO_PROCESS, own) + nice, 19))
