"""Threads of the registry's own: a database or a store that does not answer must not hold up anything else."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_THREADS = 8


class Calls:
    """Runs what blocks, off the event loop; one torch thread each, see `open_runtime`."""

    def __init__(self, threads: int = _THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, "twinserve-registry", torch.set_num_threads, (1,))

    async def __call__(self, call: Callable[[], T], seconds: float | None = None) -> T:
        """What the call returns or raises.

        Raises:
            TimeoutError: it takes longer; it goes on all the same.
        """
        running = asyncio.get_running_loop().run_in_executor(self._pool, call)
        return await asyncio.wait_for(asyncio.shield(running), seconds)

    def close(self) -> None:
        """Take no more calls; those that run are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
