"""Memory of the worker process: how much it has, how much it may have, how to tell that it got no more."""

import contextlib
import ctypes
import resource
from pathlib import Path

_ANONYMOUS = "RssAnon:"


def limit_memory(nbytes: int | None) -> None:
    """Let allocations fail once the process has that many bytes of its own; files mapped for reading are free."""
    if nbytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def own_memory() -> int:
    """Bytes of memory that is this process's alone."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(_ANONYMOUS):
            return int(line.split()[1]) * 1024
    return 0


def give_back_memory() -> None:
    """Hand freed memory to the system, where the C library can."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_shortage(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that there was no memory."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, MemoryError) or "allocate memory" in text or "out of memory" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
