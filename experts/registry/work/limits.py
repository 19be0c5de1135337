"""Memory of the worker process: how much it has, how much it may have; how to tell that it, or the disk, ran out."""

import contextlib
import ctypes
import errno
import resource
from collections.abc import Iterator
from pathlib import Path

_ANONYMOUS = "RssAnon:"
_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory")


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
    return any(
        isinstance(it, MemoryError) or any(sign in str(it).lower() for sign in _NO_MEMORY)
        for it in _chain(error)
    )


def is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that there was no room on the disk."""
    return any(
        (isinstance(it, OSError) and it.errno in (errno.ENOSPC, errno.EDQUOT))
        or "no space left" in str(it).lower()
        for it in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
