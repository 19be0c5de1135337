"""The worker process: `python entry.py FD PARENT`, FD being a socket to the server that is process PARENT.

A script, not a module: priority and the bond to the parent are set before anything large is imported.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_NICENESS = 19


def bind(parent: int) -> None:
    """Give way to everything else, write no cores, and die with the thread that started us, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be bound to
        os._exit(1)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
        # Any other process that wakes takes the core at once; niceness alone lets a slice of milliseconds end first.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    bind(int(sys.argv[2]))
    from experts.registry.work.serving import serve

    serve(int(sys.argv[1]))
